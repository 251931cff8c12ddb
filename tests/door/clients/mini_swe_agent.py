# /// script
# dependencies = ["mini-swe-agent"]
# ///
"""mini-swe-agent: commands in a shell until it says that it is done."""

import json
import os

os.environ["MSWEA_SILENT_STARTUP"] = "1"
os.environ["MSWEA_COST_TRACKING"] = "ignore_errors"

from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel

model = LitellmModel(
    model_name="openai/policy",
    cost_tracking="ignore_errors",
    model_kwargs={"api_base": os.environ["OPENAI_BASE_URL"], "drop_params": True},
)
agent = DefaultAgent(
    model,
    LocalEnvironment(),
    system_template="You use a shell.",
    instance_template="{{task}}",
    step_limit=4,
)
done = agent.run("Where is the lamp?")
print(json.dumps({"reward": 1.0, "said": str(done)}))
