import pytest

from switchx.errors import UserError
from switchx.inference.config import DecodingConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0: should be at least 1"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, "3 is more than max_new_tokens = 2"),
        ({"num_beams": 2.5}, "num_beams"),
        ({"temperature": 0.0, "do_sample": True}, "temperature = 0.0: should be positive"),
        ({"top_p": 1.5, "do_sample": True}, "top_p = 1.5: should be between 0 and 1"),
        ({"top_p": 0.5}, "top_p says what to draw from; set do_sample = True"),
        ({"do_sample": True, "num_beams": 2}, "do_sample: beam search takes the most probable"),
        ({"num_return_sequences": 3, "num_beams": 2}, "take as many beams"),
        (
            {"early_stopping": "always"},
            "early_stopping = 'always': should be True, False or 'never'",
        ),
        ({"bad_words_ids": [[1], []]}, "bad_words_ids .* none of them empty"),
        ({"exponential_decay_length_penalty": [3]}, "exponential_decay_length_penalty"),
        ({"eos_token_id": -1}, "eos_token_id = -1: should be at least 0"),
    ],
)
def test_mistakes_name_the_field_and_the_mend(fields, message):
    with pytest.raises(UserError, match=message):
        DecodingConfig(**fields)


def test_settings_can_be_compiled_for():
    config = DecodingConfig(bad_words_ids=[[3, 4]], suppress_tokens=[5], do_sample=True)
    assert hash(config) == hash(
        DecodingConfig(bad_words_ids=((3, 4),), suppress_tokens=(5,), do_sample=True)
    )
    assert config.sequences == 1
    assert DecodingConfig(num_beams=4, num_return_sequences=2).sequences == 4
