"""From token ids to text, without waiting for transformers where its tokenizer is one file."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flash.replay.logged_run import LoggedRun, first_model
from flash.trainer.checkpoint import MODEL_FOLDER

_TOKENIZER_FILE = "tokenizer.json"
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # at the end: of the next token comes the rest


class Decoder:
    """Writes tokens as the run's tokenizer does, special ones too."""

    def __init__(self, decode: Callable[..., str]) -> None:
        self._decode = decode

    def __call__(self, token_ids: Sequence[int]) -> str:
        return self._decode(list(token_ids), skip_special_tokens=False)

    def words(self, token_ids: Sequence[int]) -> str:
        """Without special tokens."""
        return self._decode(list(token_ids), skip_special_tokens=True)

    def pieces(self, token_ids: Sequence[int]) -> Iterator[str]:
        """What each token adds to the text; what several write together comes with the last."""
        start = end = 0  # of the tokens before, whose text is known
        for stop in range(1, len(token_ids) + 1):
            before, text = self(token_ids[start:end]), self(token_ids[start:stop])
            if text.endswith(_UNFINISHED) and stop < len(token_ids):
                yield ""
                continue
            yield text[len(before) :]
            start, end = end, stop


def decoder_of(run: LoggedRun) -> Decoder:
    """By the tokenizer of a checkpoint, or of the model that the run began with.

    ValueError if there is none.
    """
    for path in sorted(run.path.glob(f"checkpoints/step_*[0-9]/{MODEL_FOLDER}/{_TOKENIZER_FILE}")):
        return _of_file(path)
    model = first_model(run)
    if (path := Path(model) / _TOKENIZER_FILE).is_file():
        return _of_file(path)
    if not Path(model).is_dir():
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  (only of a hub's model)

        cached = try_to_load_from_cache(model, _TOKENIZER_FILE)
        if isinstance(cached, str):
            return _of_file(Path(cached))
    from flash.parts.model import load_tokenizer  # noqa: PLC0415  (imports transformers)

    tokenizer: Any = load_tokenizer(model)
    return Decoder(tokenizer.decode)


def _of_file(path: Path) -> Decoder:
    from tokenizers import Tokenizer  # noqa: PLC0415  (not where nothing is decoded)

    try:
        return Decoder(Tokenizer.from_file(str(path)).decode)
    except Exception as error:  # it raises no other kind
        raise ValueError(f"{path} is no tokenizer that can be read: {error}") from error
