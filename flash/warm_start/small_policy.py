"""A small language model made on the spot: for laptops, examples and tests without downloads.

    vocabulary of an environment ──→ word-level tokenizer ┐
    layers, hidden size, seed ─────→ random Llama weights ┴→ a Hugging Face directory

Each word or phrase of the vocabulary ("go to", "drawer 3") is one token, so naming a thing is
copying one token and a command is two to four of them. Case is lost; so are punctuation, articles
and "and" where the vocabulary does not name them; any other unknown word becomes `<unk>`.
Decoding gives the phrases joined by spaces, which is exactly a command of a text game. The
tokenizer has a chat template, so that agents that speak OpenAI's protocol can use the policy.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flash.system.quiet import no_progress_bars

STOP_TOKEN = "<stop>"  # ends every action
ACTION_TOKEN = "<act>"  # starts every action: without it small policies continue the observation
PAD_TOKEN = "<pad>"
UNKNOWN_TOKEN = "<unk>"
SPECIAL_TOKENS = (PAD_TOKEN, UNKNOWN_TOKEN, STOP_TOKEN, ACTION_TOKEN)

# A conversation reads as in the `plain` style: what is seen, <act>, the action, <stop>, and so on.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    f"{ACTION_TOKEN} {{{{ message.content }}}} {STOP_TOKEN} "
    "{% else %}{{ message.content }} {% endif %}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{ACTION_TOKEN}{{% endif %}}"
)

_LEFT_OUT = ("a", "an", "the", "and")


def create(
    directory: str | Path,
    vocabulary: Iterable[str],
    *,
    layers: int = 3,
    hidden_size: int = 128,
    heads: int = 4,
    max_tokens: int = 2048,
    seed: int = 0,
) -> Path:
    """Writes tokenizer and untrained model; `AutoTokenizer` and `AutoModelForCausalLM` load them.

    `max_tokens` is the longest sequence. The same arguments give the same files.
    Raises ValueError for sizes that can't be.
    """
    import torch  # noqa: PLC0415 (heavy: `import flash` must not need it)
    import transformers  # noqa: PLC0415

    if layers < 1:
        raise ValueError(f"layers={layers}: give 1 or more")
    if heads < 1 or hidden_size % (2 * heads):
        raise ValueError(
            f"hidden_size={hidden_size}: give a multiple of 2 * heads = {2 * heads}, "
            "so that each head has an even width"
        )
    directory = Path(directory)
    tokenizer = _tokenizer(vocabulary)
    # Not Qwen2: for that type AutoTokenizer (transformers 5) puts a tokenizer of its own in the
    # place of the one that was saved.
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,  # the token to copy is scored against its own embedding
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(STOP_TOKEN),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD_TOKEN),
    )
    model_class: Any = transformers.AutoModelForCausalLM  # its types are not published
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class.from_config(config, dtype=torch.float32)
    with no_progress_bars():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _tokenizer(vocabulary: Iterable[str]) -> Any:
    import transformers  # noqa: PLC0415
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers  # noqa: PLC0415

    phrases = sorted({" ".join(phrase.lower().split()) for phrase in vocabulary} - {""})
    if not phrases:
        raise ValueError("vocabulary is empty: a tokenizer needs at least one word")
    # The words of each phrase too, so that a new combination of them is not unknown.
    words = {word for phrase in phrases for word in re.findall(r"\w+", phrase)}
    tokens = [*SPECIAL_TOKENS, *sorted({*phrases, *words} - set(SPECIAL_TOKENS))]
    backend = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN_TOKEN)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(
        Regex(_pattern(phrases)), behavior="removed", invert=True
    )
    tokenizer_class: Any = transformers.PreTrainedTokenizerFast
    return tokenizer_class(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        eos_token=STOP_TOKEN,
        additional_special_tokens=[ACTION_TOKEN],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _pattern(phrases: Iterable[str]) -> str:
    """What is kept of a text, longest phrase first; what it doesn't match is left out."""
    by_start: dict[str, list[str]] = {}
    for phrase in phrases:
        start, _, _ = phrase.partition(" ")
        by_start.setdefault(start, []).append(phrase[len(start) :])
    groups = []  # by first word: a flat alternation of a thousand phrases is slow to match
    for start in sorted(by_start):
        rests = sorted(by_start[start], key=lambda rest: (-len(rest), rest))
        options = "|".join(_escape(rest) + _whole(start + rest, at_end=True) for rest in rests)
        groups.append(f"{_whole(start, at_end=False)}{_escape(start)}(?:{options})")
    left_out = "|".join(_LEFT_OUT)
    return rf"{'|'.join(groups)}|\b(?!(?:{left_out})\b)\w+"


def _whole(phrase: str, *, at_end: bool) -> str:
    """A word is matched whole ("drawer 1" is not in "drawer 12"); "+" may touch what it likes."""
    if not re.match(r"\w", phrase[-1] if at_end else phrase[0]):
        return ""
    return r"(?!\w)" if at_end else r"(?<!\w)"


def _escape(text: str) -> str:
    # re.escape also escapes spaces and letters' neighbours that Oniguruma takes literally.
    return re.sub(r"([\\.^$|?*+()\[\]{}#&~-])", r"\\\1", text)
