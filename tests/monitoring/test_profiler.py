"""The profiler reports the number of steps in its trace."""

import json

import pytest

from triderm_dist.monitoring.profiler import profiler


@pytest.mark.parametrize(("taken", "recorded"), [(2, 0), (3, 0), (4, 1), (8, 5), (12, 5)])
def test_recorded_steps_are_reported(tmp_path, capsys, taken, recorded):
    with profiler(tmp_path, 5) as profile:
        for _ in range(taken):
            profile.step()
    output = " ".join(capsys.readouterr().out.split())
    if not recorded:
        assert f"no trace, since the first 3 steps are not recorded and {taken} were taken" in output
        assert not (tmp_path / "trace.json").exists()
        return
    assert f"{recorded} steps are in {tmp_path / 'trace.json'}" in output
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    assert len(steps) == recorded + (recorded < 5)  # plus one for the time after the last step
