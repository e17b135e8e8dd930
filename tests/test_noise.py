"""Keys of the noise: fixed for ever (seeded output must not change between releases), distinct, well mixed."""

from __future__ import annotations

from engine import noise


def test_keys_are_those_of_the_first_release():
    assert noise.row_key(0, 0, 0) == 2558736989570252433
    assert noise.row_key(42, 3, 17) == 5288231632694027484
    assert noise.row_key(-1, 0, 5) == -1318357178728719620


def test_keys_fit_a_signed_64_bit_integer_and_use_its_whole_range():
    keys = [noise.row_key(1, 0, index) for index in range(1000)]
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert min(keys) < -(2**62)
    assert max(keys) > 2**62


def test_seed_choice_output_index_and_purpose_each_change_the_key():
    keys = {
        noise.row_key(seed, choice, index, purpose)
        for seed in range(8)
        for choice in range(8)
        for index in range(64)
        for purpose in range(3)
    }
    assert len(keys) == 8 * 8 * 64 * 3


def test_seeds_that_are_equal_modulo_two_to_the_64_give_equal_keys():
    assert noise.row_key(-5, 1, 2) == noise.row_key(2**64 - 5, 1, 2)


def test_one_bit_of_the_index_changes_about_half_of_the_key():
    changed = [(noise.row_key(9, 0, index) ^ noise.row_key(9, 0, index ^ 1)) & (2**64 - 1) for index in range(500)]
    mean = sum(bits.bit_count() for bits in changed) / len(changed)
    assert 31 < mean < 33
