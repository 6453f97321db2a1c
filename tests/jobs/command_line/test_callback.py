"""The callback also works in the processes of launchers."""

import pickle

from bqnn.jobs.command_line.callback import SweepCallback


def test_a_process_of_a_launcher_knows_who_launched_it() -> None:
    callback = SweepCallback()
    assert callback.launched_from is None
    callback.launched_from = 5
    assert pickle.loads(pickle.dumps(callback)).launched_from == 5
