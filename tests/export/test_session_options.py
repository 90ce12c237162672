"""The options of onnxruntime's sessions: in the file's metadata, and in every session that is opened here."""

import json

import onnx
import pytest
import torch
from conftest import make_vim

import ssmcompress
from ssmcompress.errors import InputError, SsmCompressWarning
from ssmcompress.export import runtime
from ssmcompress.export.graph import trace
from ssmcompress.export.onnx import build_onnx
from ssmcompress.export.runtime import SESSION, newest_opset, open_session, read_session, session_options
from ssmcompress.export.verify import verify_onnx

SPINNING = "session.intra_op.allow_spinning"


@pytest.fixture(scope="module")
def model():
    return make_vim(depth=1)


@pytest.fixture(scope="module")
def graph(model):
    return build_onnx(model)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def opened(monkeypatch):
    """The options of each session that is opened in a test: the number of threads, and whether they may spin."""
    found, genuine = [], runtime.session_options

    def recorded(recommended=SESSION):
        options = genuine(recommended)
        found.append((options.intra_op_num_threads, options.get_session_config_entry(SPINNING)))
        return options

    monkeypatch.setattr(runtime, "session_options", recorded)
    return found


def metadata(graph):
    return json.loads({entry.key: entry.value for entry in graph.metadata_props}["ssmcompress"])


def with_session(graph, session):
    """A copy of a graph whose metadata recommends other options; None: none, as in files of earlier versions."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    about = {**metadata(graph), "session": session}
    if session is None:
        del about["session"]
    onnx.helper.set_model_props(copy, {"ssmcompress": json.dumps(about)})
    return copy


def test_a_file_recommends_the_options_that_its_figures_were_measured_with(model, tmp_path, two_threads, opened):
    newest_opset()  # which opens sessions of its own, once
    opened.clear()
    options = ssmcompress.OnnxOptions(latency=True)
    result = ssmcompress.export_onnx(model, tmp_path / "m.onnx", options)
    assert metadata(onnx.load(tmp_path / "m.onnx"))["session"] == result.session == SESSION
    assert SESSION["intra_op_num_threads"] == 0  # independent of the exporting machine
    assert set(opened) == {(2, "0")}
    assert result.latency_settings["onnxruntime_threads"] == 2


def test_verify_opens_the_file_as_it_says(model, graph, two_threads, opened):
    asked = {"intra_op_num_threads": 1, "config": {SPINNING: "1"}}
    assert verify_onnx(model, with_session(graph, asked)).passed
    assert set(opened) == {(1, "1")}


def test_a_file_of_an_earlier_version_is_opened_with_the_options_of_today(model, graph, two_threads, opened):
    bare = onnx.ModelProto()
    bare.CopyFrom(graph)
    del bare.metadata_props[:]
    for file in (with_session(graph, None), bare):
        assert verify_onnx(model, file).passed
    assert set(opened) == {(2, "0")}


def test_a_file_gets_no_more_threads_than_there_are(two_threads):
    asked = {"intra_op_num_threads": 10**30, "config": {}}
    assert session_options(read_session(json.dumps({"session": asked}))).intra_op_num_threads == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        (b"\xff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", r"is \[\], expected an object"),
        ('{"session": 3}', "session is 3, expected an object"),
        ('{"session": {"intra_op_num_threads": "all"}}', "num_threads is 'all', expected a whole number from 0"),
        ('{"session": {"intra_op_num_threads": -1}}', "num_threads is -1, expected"),
        ('{"session": {"intra_op_num_threads": 1.5}}', "num_threads is 1.5, expected"),
        ('{"session": {"intra_op_num_threads": true}}', "num_threads is True, expected"),
        ('{"session": {"intra_op_num_threads": NaN}}', "num_threads is nan, expected"),
        ('{"session": {"config": []}}', r"session.config is \[\], expected an object"),
        (json.dumps({"session": {"config": {SPINNING: 0}}}), 'allow_spinning.* is 0, expected the text "0" or "1"'),
        (json.dumps({"session": {"config": {SPINNING: "x" * 9999}}}), "is 'xxx.*expected the text"),
        (json.dumps({"session": {"config": {SPINNING: {"0": "\n"}}}}), "expected the text"),
    ],
)
def test_odd_options_are_named_in_one_short_line(text, message):
    with pytest.raises(InputError, match=message) as caught:
        read_session(text)
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


def test_verify_says_what_is_odd(model, graph):
    with pytest.raises(InputError, match="of the ONNX file: session.intra_op_num_threads is 'all'"):
        verify_onnx(model, with_session(graph, {"intra_op_num_threads": "all"}))


def test_unknown_options_are_not_applied_and_noted(model, graph, tmp_path):
    """onnxruntime has entries that make it write files, or read weights of another folder."""
    harm = "session.optimized_model_external_initializers_file_name"
    asked = {"config": {harm: str(tmp_path / "x"), SPINNING: "0"}, "inter_op_num_threads": 7}
    with pytest.warns(SsmCompressWarning) as warned:
        assert verify_onnx(model, with_session(graph, asked)).passed
    (line,) = [text for warning in warned if "session options" in (text := str(warning.message))]
    assert "2 unknown session options are not applied ('inter_op_num_threads', 'session.opti" in line
    assert list(tmp_path.iterdir()) == []
    assert read_session(json.dumps({"session": asked}))["config"] == {SPINNING: "0"}


def test_threads_of_a_session_neither_spin_nor_are_pinned(graph, two_threads):
    """onnxruntime's own 0 threads pin each of them to a core."""
    import os

    session = open_session(graph.SerializeToString())
    assert session.get_session_options().intra_op_num_threads == 2
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        assert all(os.sched_getaffinity(int(thread)) == allowed for thread in os.listdir("/proc/self/task"))


def test_every_graph_has_them(model):
    assert metadata(trace(model, newest_opset()))["session"] == SESSION
