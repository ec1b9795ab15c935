"""A run under EleutherAI's lm-evaluation-harness: the model 'switchx' of its registry.

The harness knows contexts and continuations. Here a context is what the encoder reads, and a
continuation what the decoder says: leading spaces of a continuation, which join it to its context
in a decoder-only model, are left out.
"""

import functools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from switchx import sharding
from switchx.data import pipeline
from switchx.data.span_corruption import EOS
from switchx.errors import UserError
from switchx.experiment import read_experiment
from switchx.scorecard import predictor
from switchx.trained import find_checkpoints, load, progress

_PACKAGE = "lm_eval"
_LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Answers:
    """The harness's three kinds of requests, answered by a checkpoint.

    A request has `args`: (context, continuation), (text,) or (context, settings).

    Args:
      run_directory: a run's.
      checkpoint: 'last', 'best' or a step.
      batch_size: examples at a time. The harness gives 1 where the user gave none: 1 and 'auto'
        are the run's own.
      inputs_length, targets_length: tokens of an encoder row and of a decoder row, EOS included;
        None for those of training.
      score_eos: whether the end of a continuation is scored as well. The harness's own
        encoder-decoder models do not.
      unused: what the harness gives to all models (device, max_batch_size).

    Raises:
      UserError: as `read_experiment`, `find_checkpoints` and `load`.
    """

    def __init__(
        self,
        run_directory: str,
        checkpoint: str | int = "last",
        batch_size: str | int | None = None,
        inputs_length: int | None = None,
        targets_length: int | None = None,
        score_eos: bool = False,
        **unused: Any,
    ):
        super().__init__()
        del unused
        changes = []
        if str(batch_size) not in ("None", "1", "auto"):
            changes.append(f"BATCH_SIZE={batch_size}")
        lengths = dict(read_experiment(str(run_directory)).data.task_feature_lengths)
        lengths |= {"inputs": inputs_length} if inputs_length else {}
        lengths |= {"targets": targets_length} if targets_length else {}
        self._experiment = read_experiment(
            str(run_directory), [*changes, f"TASK_FEATURE_LENGTHS={lengths}"]
        )
        which = find_checkpoints(str(run_directory), str(checkpoint))
        if len(which) > 1:
            raise UserError(f"checkpoint={checkpoint}: one at a time; give last, best or a step")
        self.checkpoint: pathlib.Path = which[0]
        trained = load(self._experiment, self.checkpoint)
        self._mesh = trained.mesh
        self._predictor = predictor(self._experiment, trained.params, trained.mesh)
        self._score_eos = bool(score_eos)

    def loglikelihood(self, requests: Sequence[Any], **settings: Any) -> list[tuple[float, bool]]:
        """log p(continuation | context) of each, and whether greedy decoding would say it.

        Of a context that is too long its last tokens are read.

        Raises:
          UserError: a continuation that is longer than a decoder row.
        """
        del settings
        pairs = []
        for request in requests:
            context, continuation = request.args
            targets = self._encode(continuation.lstrip())
            if len(targets) > self._predictor.lengths[1]:
                raise UserError(
                    f"a continuation has {len(targets)} tokens, more than targets_length = "
                    f"{self._predictor.lengths[1]}: {continuation[:40]!r}…; give "
                    f"--model_args ...,targets_length={len(targets)}"
                )
            pairs.append((self._context(context.rstrip()), targets))
        return [(score.log_likelihood, score.is_greedy) for score in self._score(pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any], **settings: Any) -> list[float]:
        """log p(text) of each, every token predicted once.

        The decoder takes a text in pieces of its length; the encoder reads as much as it holds of
        what came before the piece, and nothing but EOS before the first one.
        """
        del settings
        owners, pairs = [], []
        for number, request in enumerate(requests):
            for pair in self._pieces(pipeline.encode_text(self._data, request.args[0])[:-1]):
                owners.append(number)
                pairs.append(pair)
        sums = [0.0] * len(requests)
        for owner, score in zip(owners, self._score(pairs), strict=True):
            sums[owner] += score.log_likelihood
        return sums

    def generate_until(self, requests: Sequence[Any], **settings: Any) -> list[str]:
        """What greedy decoding says to each context, up to the first of its stop strings.

        Raises:
          UserError: settings that ask for sampling.
        """
        del settings
        asked = [request.args for request in requests]
        for _, wanted in asked:
            if wanted.get("do_sample") or float(wanted.get("temperature") or 0.0):
                raise UserError("this model decodes greedily; set do_sample: false in the task")
        inputs = [self._context(context.rstrip()) for context, _ in asked]
        with sharding.use(self._mesh, self._experiment.rules):
            said = list(self._predictor.generate(progress(inputs, "generating", "contexts")))
        return [
            self._stopped(tokens, wanted) for tokens, (_, wanted) in zip(said, asked, strict=True)
        ]

    @property
    def _data(self) -> pipeline.DataConfig:
        return self._experiment.data

    def _encode(self, text: str) -> list[int]:
        tokens = pipeline.encode_text(self._data, text)
        return tokens if self._score_eos else tokens[:-1]

    def _context(self, text: str) -> list[int]:
        return pipeline.encode_text(self._data, text)[-self._predictor.lengths[0] :]

    def _pieces(self, tokens: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        inputs_length, targets_length = self._predictor.lengths
        for start in range(0, len(tokens), targets_length):
            before = tokens[max(start - inputs_length + 1, 0) : start]
            yield [*before, EOS], tokens[start : start + targets_length]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterable[Any]:
        with sharding.use(self._mesh, self._experiment.rules):
            yield from self._predictor.score(progress(pairs, "scoring", "continuations"))

    def _stopped(self, tokens: Any, wanted: Mapping[str, Any]) -> str:
        limit = next((wanted[key] for key in _LENGTH_KEYS if wanted.get(key)), None)
        text = pipeline.decode_tokens(self._data, tokens[:limit])
        until = wanted.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        return text


@functools.cache
def register() -> type[Answers]:
    """The harness's model class, entered into its registry as 'switchx'.

    Raises:
      UserError: the harness is not installed.
    """
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
        from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"the harness is not installed ({error}); pip install 'switchx[{_PACKAGE}]'"
        ) from None
    return register_model("switchx")(type("SwitchxLM", (Answers, LM), {"__doc__": Answers.__doc__}))


def main() -> None:
    """The harness's own command line, with the model 'switchx' in it."""
    register()
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
