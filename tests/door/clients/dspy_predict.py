# /// script
# dependencies = ["dspy"]
# ///
"""DSPy's prediction with its chat adapter, which knows no tools of the protocol."""

import json
import os

import dspy

dspy.configure(
    lm=dspy.LM(
        "openai/policy", api_base=os.environ["OPENAI_BASE_URL"], cache=False, temperature=None
    ),
    adapter=dspy.ChatAdapter(use_json_adapter_fallback=False),
)
done = dspy.Predict("question -> answer")(question="Where is the lamp?")
print(json.dumps({"reward": 1.0, "said": done.answer}))
