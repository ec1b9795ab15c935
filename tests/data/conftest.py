"""What several data tests need."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """No jaxtyping checks: gin passes whatever a user writes, and our own checks must catch it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def rebuild():
    """The inverse of span corruption."""
    return _rebuild


def _rebuild(example, vocab_size):
    """The raw tokens, from inputs and targets alone."""
    assert example.inputs[-1] == example.targets[-1] == 1
    spans = {}
    for token in example.targets[:-1].tolist():
        if token >= vocab_size - 100:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    tokens = []
    for token in example.inputs[:-1].tolist():
        tokens += spans.pop(token) if token >= vocab_size - 100 else [token]
    assert not spans
    return tokens
