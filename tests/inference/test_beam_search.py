"""Beam search written out for one row; tests/inference/test_decoding.py has Hugging Face's."""

import jax.numpy as jnp
import numpy as np

from switchx.inference.config import EOS_ID, PAD_ID, DecodingConfig
from switchx.inference.decoding import generate
from tests.inference.test_decoding import LENGTH, rows, small, teacher_forced


def slow_beams(config, params, row, *, beams, penalty):
    """All continuations of the beams at once, with the rules of `beam_search` written out."""
    running, finished = [(0.0, [])], []
    for length in range(1, LENGTH + 1):
        candidates = []
        for score, tokens in running:
            log_probs = teacher_forced(config, params, row, np.asarray([*tokens, PAD_ID]))[-1]
            candidates += [(score + log_probs[t], [*tokens, t]) for t in range(len(log_probs))]
        candidates = sorted(candidates, reverse=True)[: 2 * beams]
        ends = [tokens[-1] == EOS_ID or length == LENGTH for _, tokens in candidates]
        finished += [
            (score / length**penalty, tokens)
            for (score, tokens), end in zip(candidates[:beams], ends, strict=False)
            if end
        ]
        finished = sorted(finished, reverse=True)[:beams]
        running = [each for each, end in zip(candidates, ends, strict=True) if not end][:beams]
        if not running or (
            len(finished) == beams and running[0][0] / length**penalty <= finished[-1][0]
        ):
            break
    return finished


def test_beam_search_is_the_search_by_hand():
    config, params = small(num_encoder_layers=1, num_decoder_layers=1, sparse_every=1)
    params["token_embedder"]["embedding"] *= 0.5
    decoding = DecodingConfig(
        max_new_tokens=LENGTH, num_beams=3, num_return_sequences=3, length_penalty=0.5
    )
    found = generate(config, params, jnp.asarray(rows()), decoding)
    for number in (0, 3):
        expected = slow_beams(config, params, rows()[number], beams=3, penalty=0.5)
        for (score, tokens), mine, my_score in zip(
            expected, found.tokens[number], found.scores[number], strict=True
        ):
            np.testing.assert_array_equal(mine[: len(tokens)], tokens)
            np.testing.assert_allclose(my_score, score, rtol=1e-4)
