"""Parts of a model in two processes (gloo, torchrun's environment) against the whole one."""

import sys

import forked
import pytest
import sharded_models


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no forks")
def test_sharded_models_have_the_same_gradients_and_state(tmp_path):
    codes, said = forked.run_two(sharded_models.same_gradients_and_state, logs=tmp_path, seconds=240)
    assert codes == [0, 0], said
    assert said.count("the same") == 2 * 2 * len(sharded_models.MODELS)


@pytest.mark.skipif(sys.platform == "win32", reason="no forks")
def test_muon_updates_sharded_models_as_whole_ones(tmp_path):
    codes, said = forked.run_two(sharded_models.same_steps_of_muon, logs=tmp_path, seconds=240)
    assert codes == [0, 0], said
    assert said.count("the same") == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no forks")
def test_sharded_models_whose_blocks_are_compiled(tmp_path):
    codes, said = forked.run_two(sharded_models.same_gradients_and_state_compiled, logs=tmp_path, seconds=480)
    assert codes == [0, 0], said
    assert said.count("the same") == 2 * 2
