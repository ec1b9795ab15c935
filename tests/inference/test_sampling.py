import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx.errors import UserError
from switchx.inference import sampling
from switchx.inference.config import DecodingConfig
from switchx.inference.decoding import generate
from tests.inference.test_decoding import LENGTH, rows, small


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_row_depends_on_no_other_row_whatever_is_drawn(scan_layers):
    config, params = small(scan_layers=scan_layers)
    decoding = DecodingConfig(
        max_new_tokens=LENGTH, do_sample=True, num_return_sequences=3, top_p=0.9
    )
    key, tokens = jax.random.key(7), rows()
    together = generate(config, params, jnp.asarray(tokens), decoding, rng=key)
    assert len({tuple(row) for row in np.asarray(together.tokens).reshape(-1, LENGTH)}) > 6
    order = np.asarray([3, 1, 2, 0])
    other = generate(
        config, params, jnp.asarray(tokens[order]), decoding, rng=key, row_ids=jnp.asarray(order)
    )
    np.testing.assert_array_equal(other.tokens, np.asarray(together.tokens)[order])
    np.testing.assert_allclose(other.scores, np.asarray(together.scores)[order], rtol=1e-5)


def test_sampling_without_a_key_is_refused():
    config, params = small()
    with pytest.raises(UserError, match="do_sample needs a key"):
        generate(config, params, jnp.asarray(rows()), DecodingConfig(do_sample=True))


def test_tokens_are_drawn_as_often_as_they_are_probable():
    config, params = small(scan_layers=True)
    inputs = jnp.asarray(rows()[:1])
    decoding = DecodingConfig(
        max_new_tokens=1, do_sample=True, num_return_sequences=2000, temperature=2.0, top_k=4
    )
    found = generate(config, params, inputs, decoding, rng=jax.random.key(0))
    tokens, counts = np.unique(np.asarray(found.tokens), return_counts=True)
    assert len(tokens) == 4
    drawn = zip(found.tokens[0, :, 0], np.exp(found.scores[0]), strict=True)
    probabilities = {int(token): probability for token, probability in drawn}
    np.testing.assert_allclose(sum(probabilities.values()), 1, rtol=1e-4)
    expected = np.asarray([probabilities[int(token)] for token in tokens])
    assert np.all(np.abs(counts / 2000 - expected) < 5 * np.sqrt(expected * (1 - expected) / 2000))


def test_what_is_drawn_from_is_cut_in_order():
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.1]]))
    config = DecodingConfig(do_sample=True, top_k=3, top_p=0.6)
    # Of the three kept, 0.9 in all, the first two are the first to reach 0.6 of it.
    kept = np.isfinite(sampling.cut_off(logits, config))
    np.testing.assert_array_equal(kept, [[True, True, False, False]])


def test_the_largest_is_the_first_of_equals_and_always_a_token():
    logits = jnp.asarray([[1.0, 3.0, 3.0], [-jnp.inf] * 3, [jnp.nan, 0.0, 1.0]])
    found = sampling._largest(logits)
    np.testing.assert_array_equal(found[:2], jnp.argmax(logits, axis=-1)[:2])
    assert 0 <= found[2] < 3
