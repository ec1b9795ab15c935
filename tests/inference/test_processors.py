"""Every processor against the one of the same name in Hugging Face's library."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx.inference import processors, sampling
from switchx.inference.config import DecodingConfig

ORACLE = dict(np.load(pathlib.Path(__file__).parents[1] / "oracles/logits_processors/oracle.npz"))
SCORES = jnp.asarray(ORACLE["scores"])
TOKENS = jnp.asarray(ORACLE["input_ids"])
ENCODER_6, ENCODER_9 = jnp.asarray(ORACLE["encoder_ids_6"]), jnp.asarray(ORACLE["encoder_ids_9"])
BAD_WORDS = [[int(t) for t in row if t >= 0] for row in ORACLE["bad_words_sequences"]]
LENGTH = TOKENS.shape[1]
EOS = 1


FOUND = {
    "temperature_0_7": lambda x, t, n: processors.temperature(x, 0.7),
    "top_k_5": lambda x, t, n: processors.top_k(x, 5),
    "top_p_0_8": lambda x, t, n: processors.top_p(x, 0.8),
    "top_p_0_3_keep3": lambda x, t, n: processors.top_p(x, 0.3, min_tokens=3),
    "min_p_0_1": lambda x, t, n: processors.min_p(x, 0.1),
    "typical_0_7": lambda x, t, n: processors.typical_p(x, 0.7),
    "epsilon_0_02": lambda x, t, n: processors.epsilon_cutoff(x, 0.02),
    "eta_0_02": lambda x, t, n: processors.eta_cutoff(x, 0.02),
    "repetition_penalty_1_4": lambda x, t, n: processors.repetition_penalty(x, t, n, 1.4),
    "encoder_repetition_penalty_1_4": lambda x, t, n: processors.encoder_repetition_penalty(
        x, ENCODER_6, 1.4
    ),
    "no_repeat_ngram_2": lambda x, t, n: processors.no_repeat_ngram(x, t, n, 2),
    "no_repeat_ngram_3": lambda x, t, n: processors.no_repeat_ngram(x, t, n, 3),
    "encoder_no_repeat_ngram_2": lambda x, t, n: processors.encoder_no_repeat_ngram(
        x, t, n, ENCODER_9, 2
    ),
    "min_length_30_eos_1": lambda x, t, n: processors.min_length(x, n, 30, EOS),
    "min_new_tokens_4_prompt_13_eos_1": lambda x, t, n: processors.min_length(x, n, 17, EOS),
    "bad_words": lambda x, t, n: processors.bad_words(x, t, n, BAD_WORDS),
    "forced_bos_4": lambda x, t, n: processors.forced_token(x, 1, 1, 4),
    "forced_eos_at_max": lambda x, t, n: processors.forced_token(x, n, LENGTH, EOS),
    "suppress_5_6": lambda x, t, n: processors.suppress(x, [5, 6]),
    "exponential_decay_from_10": lambda x, t, n: processors.exponential_decay(x, n, 10, 1.2, EOS),
    "top_k_10_top_p_0_9_temperature_0_8": lambda x, t, n: sampling.cut_off(
        x, DecodingConfig(do_sample=True, temperature=0.8, top_k=10, top_p=0.9)
    ),
}


def test_every_processor_of_the_oracle_is_here():
    assert {f"out:{name}" for name in FOUND} == {n for n in ORACLE if n.startswith("out:")}


@pytest.mark.parametrize("name", FOUND)
def test_equals_hugging_face(name):
    # In a buffer with places that are not filled yet, as decoding has it.
    tokens = jnp.pad(TOKENS, ((0, 0), (0, 4)))
    found = jax.jit(FOUND[name])(SCORES, tokens, jnp.int32(LENGTH))
    want = ORACLE[f"out:{name}"]
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(want))
    np.testing.assert_allclose(found, want, rtol=1e-6)
