"""`DecodingConfig`: how the tokens of a sequence are chosen."""

import dataclasses
import math
from collections.abc import Sequence

from switchx.errors import UserError, check_range, check_types

PAD_ID = 0
EOS_ID = 1
# What is drawn from: temperature, and what cuts the distribution off.
SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
_AT_LEAST = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "top_k": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How tokens are chosen. Names and meanings are those of Hugging Face's `GenerationConfig`.

    The defaults are greedy search. A processor that is None is off.

    Attributes:
      max_new_tokens: most tokens of a sequence, end-of-sequence included.
      min_new_tokens: no end-of-sequence among so many first tokens.
      do_sample: draw tokens instead of taking the most probable.
      temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff: what is drawn from,
        see `processors`; applied in this order.
      num_beams: sequences kept of each row in beam search; 1 for none.
      num_return_sequences: sequences given back of each row: draws, or the best beams.
      length_penalty: a finished beam's score is its log-probability / length^length_penalty.
      early_stopping: beam search ends with num_beams finished sequences (True), when no open one
        can be better at its present length (False), or at any length ("never").
      repetition_penalty, encoder_repetition_penalty, no_repeat_ngram_size,
        encoder_no_repeat_ngram_size, bad_words_ids, suppress_tokens, begin_suppress_tokens: see
        `processors`; the last ones for the first token only.
      forced_bos_token_id, forced_eos_token_id: the first token; the last, at max_new_tokens.
      exponential_decay_length_penalty: (start, factor) of `processors.exponential_decay`.
      eos_token_id: ends a sequence; None for none.
      decoder_start_token_id: what the decoder begins with.
      pad_token_id: what follows the end of a sequence.
      dropless: experts have room for every token, so that no token depends on another row or on
        padding. False takes the model's capacities, as Hugging Face does.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: int | float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: int | float = 1.0
    early_stopping: bool | str = False
    repetition_penalty: int | float | None = None
    encoder_repetition_penalty: int | float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    bad_words_ids: Sequence[Sequence[int]] = ()
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    exponential_decay_length_penalty: Sequence[int | float] | None = None
    eos_token_id: int | None = EOS_ID
    decoder_start_token_id: int = PAD_ID
    pad_token_id: int = PAD_ID
    dropless: bool = True

    def __post_init__(self) -> None:
        """Check types, ranges and what excludes what; freeze the lists."""
        check_types(self)
        for field, least in _AT_LEAST.items():
            value = getattr(self, field)
            check_range(self, field, value is None or value >= least, f"at least {least}, or None")
        for field in ("temperature", "repetition_penalty", "encoder_repetition_penalty"):
            value = getattr(self, field)
            check_range(self, field, value is None or 0 < value < math.inf, "positive")
        check_range(self, "length_penalty", math.isfinite(self.length_penalty), "a finite number")
        for field in ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            value = getattr(self, field)
            check_range(self, field, value is None or 0 <= value <= 1, "between 0 and 1, or None")
        if isinstance(self.early_stopping, str):
            valid = self.early_stopping == "never"
            check_range(self, "early_stopping", valid, "True, False or 'never'")
        self._check_together()
        words = tuple(tuple(word) for word in self.bad_words_ids)
        check_range(self, "bad_words_ids", all(words), "lists of ids, none of them empty")
        object.__setattr__(self, "bad_words_ids", words)
        for field in ("suppress_tokens", "begin_suppress_tokens"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        decay = self.exponential_decay_length_penalty
        if decay is not None:
            valid = len(decay) == 2 and isinstance(decay[0], int) and decay[1] > 0
            check_range(self, "exponential_decay_length_penalty", valid, "(start, factor), or None")
            object.__setattr__(self, "exponential_decay_length_penalty", tuple(decay))

    def _check_together(self) -> None:
        def refuse(problem: str) -> None:
            raise UserError(f"DecodingConfig.{problem}")

        if self.num_beams > 1 and self.do_sample:
            refuse("do_sample: beam search takes the most probable; set num_beams = 1")
        if not self.do_sample:
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            given = [name for name in SAMPLING if getattr(self, name) != defaults[name]]
            if given:
                refuse(f"{given[0]} says what to draw from; set do_sample = True")
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            refuse(
                f"num_return_sequences = {self.num_return_sequences} is more than num_beams = "
                f"{self.num_beams}; take as many beams, or set do_sample = True"
            )
        if self.min_new_tokens > self.max_new_tokens:
            refuse(
                f"min_new_tokens = {self.min_new_tokens} is more than max_new_tokens = "
                f"{self.max_new_tokens}"
            )

    def check_ids(self, vocab_size: int) -> None:
        """Check that the tokens named are tokens of a model.

        Raises:
          UserError: one is not.
        """
        named: dict[str, Sequence[int | None]] = {
            "eos_token_id": [self.eos_token_id],
            "pad_token_id": [self.pad_token_id],
            "decoder_start_token_id": [self.decoder_start_token_id],
            "forced_bos_token_id": [self.forced_bos_token_id],
            "forced_eos_token_id": [self.forced_eos_token_id],
            "suppress_tokens": self.suppress_tokens,
            "begin_suppress_tokens": self.begin_suppress_tokens,
            "bad_words_ids": [token for word in self.bad_words_ids for token in word],
        }
        for field, tokens in named.items():
            for token in tokens:
                if token is not None and not 0 <= token < vocab_size:
                    raise UserError(
                        f"DecodingConfig.{field}: {token} is no token of the model, which has "
                        f"0 to {vocab_size - 1}"
                    )
        if len({*self.suppress_tokens}) >= vocab_size:
            raise UserError("DecodingConfig.suppress_tokens leaves no token")

    @property
    def sequences(self) -> int:
        """Sequences of each row that are decoded side by side."""
        return max(self.num_beams, self.num_return_sequences)
