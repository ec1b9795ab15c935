"""Decoding against Hugging Face's `generate` and against slow loops over the whole model."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx.errors import UserError
from switchx.inference.config import EOS_ID, PAD_ID, DecodingConfig
from switchx.inference.decoder import dropless
from switchx.inference.decoding import generate, stream
from switchx.interop import hf
from switchx.models.t5 import T5
from tests.training.conftest import random_params, small_config

ORACLES = pathlib.Path(__file__).parents[1] / "oracles" / "huggingface"
CASES = sorted(path.name for path in ORACLES.iterdir())
NEW = 32  # tokens that the oracles have after the start token
BEAMS = {"num_beams": 4, "num_return_sequences": 2}
VARIANTS = {
    "greedy": {"eos_token_id": None},
    "greedy_eos": {},
    "greedy_repetition_penalty": {"repetition_penalty": 1.5},
    "greedy_no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "greedy_min_new_tokens": {"min_new_tokens": 20},
    "beam4": BEAMS,
    "beam4_lp2": {**BEAMS, "length_penalty": 2.0},
    "beam4_lp0_early": {**BEAMS, "length_penalty": 0.0, "early_stopping": True},
}
LENGTH = 6


def oracle(case):
    return dict(np.load(ORACLES / case / "oracle.npz"))


def check(case, variant, *, scan_layers):
    want, loaded = oracle(case), hf.load(ORACLES / case, scan_layers=scan_layers)
    eos = int(want["eos_used"])
    # Their beams are filled up with the token that ended them, their greedy searches with 0.
    pad = eos if variant.startswith("beam") else PAD_ID
    settings = {"eos_token_id": eos, "pad_token_id": pad, **VARIANTS[variant]}
    decoding = DecodingConfig(max_new_tokens=NEW, dropless=False, **settings)
    inputs = jnp.asarray(np.where(want["attention_mask"] == 1, want["input_ids"], PAD_ID))
    found = generate(loaded.config, loaded.params, inputs, decoding)
    tokens = np.asarray(found.tokens).reshape(-1, NEW)
    # Theirs end where the longest sequence does.
    ids = want[f"{variant}_ids"][:, 1:]
    np.testing.assert_array_equal(tokens[:, : ids.shape[1]], ids)
    assert (tokens[:, ids.shape[1] :] == pad).all()
    if variant.startswith("beam"):
        scores = np.asarray(found.scores).reshape(-1)
        np.testing.assert_allclose(scores, want[f"{variant}_scores"], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_search_of_hugging_face(variant):
    check("switch_overflow", variant, scan_layers=True)


@pytest.mark.parametrize(
    ("case", "variant", "scan_layers"),
    [
        ("switch", "beam4", False),
        ("switch_encoder_only_sparse", "greedy_eos", True),
        ("switch_steps_bias_untied", "beam4_lp0_early", True),
        ("switch_steps_bias_untied", "greedy_min_new_tokens", False),
        ("t5_v10_relu_tied", "greedy_no_repeat_ngram", True),
        ("t5_v11_gated_untied", "beam4", True),
    ],
)
def test_other_models_of_hugging_face(case, variant, scan_layers):
    check(case, variant, scan_layers=scan_layers)


@pytest.mark.parametrize("case", ["switch_overflow", "switch_steps_bias_untied"])
def test_without_a_cache_their_capacities_bind_and_so_do_ours(case):
    """`greedy_nocache_ids`: every step is the whole model, whose decoder then drops tokens."""
    want, loaded = oracle(case), hf.load(ORACLES / case, scan_layers=True)
    apply = jax.jit(loaded.model.apply)
    tokens = np.zeros((len(want["input_ids"]), NEW + 1), np.int32)
    for place in range(NEW):
        # Later places cannot take the slots of earlier ones.
        output = apply(
            {"params": loaded.params},
            want["input_ids"],
            tokens[:, :-1],
            encoder_mask=want["attention_mask"],
        )
        tokens[:, place + 1] = np.argmax(output.logits[:, place], axis=-1)
    np.testing.assert_array_equal(tokens, want["greedy_nocache_ids"])


def teacher_forced(config, params, row, sequence):
    """Log-probabilities [T, V] of the whole model for one row without padding."""
    inputs = np.concatenate([[PAD_ID], sequence[:-1]])[None]
    apply = jax.jit(T5(dropless(config)).apply)
    logits = apply({"params": params}, row[row != PAD_ID][None], inputs).logits
    return np.asarray(jax.nn.log_softmax(logits[0]))


def rows(seed=2):
    tokens = np.random.default_rng(seed).integers(2, 61, (4, 9)).astype(np.int32)
    tokens[1, 5:] = PAD_ID
    tokens[3, 2:] = PAD_ID
    return tokens


def small(**changes):
    # Scaled up so that the most probable token changes from step to step.
    config = small_config(scale_logits=False, **changes)
    return config, random_params(config, seed=4)


def test_greedy_is_the_whole_models_choice_at_every_step():
    config, params = small()
    found = generate(config, params, jnp.asarray(rows()), DecodingConfig(max_new_tokens=LENGTH))
    assert len({tuple(row) for row in np.asarray(found.tokens[:, 0])}) > 1
    for row, tokens, score in zip(rows(), found.tokens[:, 0], found.scores[:, 0], strict=True):
        tokens = np.asarray(tokens)
        log_probs = teacher_forced(config, params, row, tokens)
        ended = np.cumsum(tokens == EOS_ID) - (tokens == EOS_ID) > 0
        np.testing.assert_array_equal(tokens, np.where(ended, PAD_ID, log_probs.argmax(axis=-1)))
        chosen = log_probs[np.arange(LENGTH), tokens]
        np.testing.assert_allclose(score, chosen[~ended].sum(), rtol=1e-4)


def test_a_prompt_is_decoded_on():
    config, params = small(scan_layers=True)
    decoding = DecodingConfig(max_new_tokens=LENGTH, eos_token_id=None)
    tokens = generate(config, params, jnp.asarray(rows()), decoding).tokens[:, 0]
    rest = DecodingConfig(max_new_tokens=LENGTH - 2, eos_token_id=None)
    found = generate(config, params, jnp.asarray(rows()), rest, prompt=tokens[:, :2])
    np.testing.assert_array_equal(found.tokens[:, 0], tokens[:, 2:])


def test_a_stream_is_what_is_generated():
    config, params = small()
    decoding = DecodingConfig(max_new_tokens=LENGTH, do_sample=True, num_return_sequences=2)
    inputs = jnp.asarray(rows())
    whole = generate(config, params, inputs, decoding, rng=jax.random.key(3)).tokens
    pieces = list(stream(config, params, inputs, decoding, rng=jax.random.key(3)))
    np.testing.assert_array_equal(np.stack(pieces, axis=-1), whole[..., : len(pieces)])
    with pytest.raises(UserError, match="num_beams: only without beams"):
        next(stream(config, params, inputs, DecodingConfig(num_beams=2)))


def test_after_end_of_sequence_there_is_only_padding():
    config = small_config(tie_embeddings=False, scale_logits=False)
    params = random_params(config, seed=4)
    # A head that ends a sequence wherever the state's first unit is positive, else says 7.
    head = np.zeros((10, 61), np.float32)
    head[0, EOS_ID], head[0, 7] = 1, -1
    params["logits_dense"] = {"kernel": jnp.asarray(head)}
    tokens = np.random.default_rng(2).integers(2, 61, (16, 5)).astype(np.int32)
    decoding = DecodingConfig(max_new_tokens=LENGTH)
    decoded = np.asarray(generate(config, params, jnp.asarray(tokens), decoding).tokens[:, 0])
    ended = decoded == EOS_ID
    assert ended.any()
    for row in decoded[ended.any(axis=1)]:
        end = row.tolist().index(EOS_ID)
        assert row[:end].tolist() == [7] * end
        assert row[end + 1 :].tolist() == [PAD_ID] * (LENGTH - end - 1)


def test_padding_is_no_part_of_the_input_for_processors_either():
    config, params = small(scan_layers=True)
    decoding = DecodingConfig(
        max_new_tokens=LENGTH, encoder_repetition_penalty=3.0, encoder_no_repeat_ngram_size=2
    )
    short = jnp.asarray(rows()[:, :5])
    wide = jnp.pad(short, ((0, 0), (0, 6)))
    found, same = (generate(config, params, each, decoding) for each in (short, wide))
    np.testing.assert_array_equal(found.tokens, same.tokens)
    np.testing.assert_allclose(found.scores, same.scores, rtol=1e-5)
