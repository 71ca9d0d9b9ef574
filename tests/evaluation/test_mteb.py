"""MTEB through the adapter against mteb on the same folder in sentence-transformers; tasks by name; mistakes."""

import json
import pathlib
import shutil
import socket
import sys

import mteb
import pytest
import threadpoolctl

from jaxembed import evaluate
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.evaluation.mteb_adapter import MtebEncoder
from jaxembed.evaluation.mteb_tasks import MtebScore, model_name, open_tasks, require_mteb, run_tasks

FILE = pathlib.Path(__file__).parent / "local_mteb_tasks.py"
NAMES = [f"{FILE}:Local{kind}" for kind in ("STS", "Retrieval", "Classification", "Clustering")]
# For each kind of text another prompt: by side, by task type, by task type and side; 'passage' is nobody's.
PROMPTS = {"query": "query: ", "passage": "no: ", "Classification": "class of: ", "Retrieval-document": "passage: "}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, no cache but the test's own."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "mteb"))

    def refuse(*_):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def one_thread():
    """Of torch and scikit-learn: theirs and jax's would wait for each other."""
    with threadpoolctl.threadpool_limits(1):
        yield


@pytest.fixture
def real_data(monkeypatch, data_dir):
    monkeypatch.setenv("JAXEMBED_DATA", str(data_dir))


@pytest.fixture(scope="module")
def folder(minilm_dir, tmp_path_factory):
    """MiniLM with prompts, also one for texts that are neither query nor document."""
    folder = tmp_path_factory.mktemp("models") / "minilm"
    shutil.copytree(minilm_dir, folder)
    path = folder / "config_sentence_transformers.json"
    settings = json.loads(path.read_text()) | {"prompts": PROMPTS, "default_prompt_name": "query"}
    path.write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def embedder(folder):
    return Embedder.load(folder)


def test_scores_are_those_of_sentence_transformers(real_data, one_thread, folder, embedder, tmp_path):
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(folder), device="cpu")
    ours = list(run_tasks(embedder, model_name(str(folder)), open_tasks(NAMES), tmp_path / "out"))
    assert [getattr(score, "task", score) for score in ours] == [name.rpartition(":")[2] for name in NAMES]
    for task, score in zip(open_tasks(NAMES), ours, strict=True):
        results = mteb.evaluate(peer, task, cache=None, co2_tracker=False, show_progress_bar=False)
        assert score.score == pytest.approx(100 * results.task_results[0].get_score(), abs=0.01), score
        assert (score.kind, score.metric) == (task.metadata.type, task.metadata.main_score)
        assert 20 < score.score < 99.9
    (written,) = (tmp_path / "out" / "results").glob("*minilm/*/LocalSTS.json")
    assert mteb.TaskResult.from_disk(written).get_score() == pytest.approx(ours[0].score / 100)


def test_prompts_are_chosen_as_by_mteb(embedder):
    """Beside sentence-transformers' own: the names of the prompts, seen through what is put before the texts."""
    encoder, seen = MtebEncoder(embedder, "a/b"), []

    class Recorder:
        encode = encode_query = encode_document = staticmethod(lambda texts, prompt, **_: seen.append(prompt))

    encoder.model = Recorder
    for name in NAMES:
        (task,) = open_tasks([name])
        for side in (None, mteb.types.PromptType.query, mteb.types.PromptType.document):
            encoder.encode([], task_metadata=task.metadata, hf_split="test", hf_subset="default", prompt_type=side)
    sts, retrieval, classification, clustering = seen[:3], seen[3:6], seen[6:9], seen[9:]
    assert sts == clustering == [None, "query: ", ""]
    assert retrieval == [None, "query: ", "passage: "]
    assert classification == ["class of: "] * 3


def test_a_task_without_data_does_not_stop_the_others(real_data, embedder, tmp_path):
    tasks = open_tasks([f"{FILE}:NoData", NAMES[0]])
    error, score = run_tasks(embedder, "a/b", tasks, tmp_path)
    assert isinstance(error, UserError) and isinstance(score, MtebScore)
    assert str(error) == "--mteb=NoData: its data cannot be loaded: ConnectionError: the hub is far away"


def test_the_command(real_data, folder, tmp_path, monkeypatch, capsys):
    """Scores first, as a table and a JSON line; then what could not be scored."""
    from absl import flags

    values = flags.FlagValues()
    for name in (*evaluate.SETS, "mteb"):
        flags.DEFINE_list(name, [], "", flag_values=values)
    flags.DEFINE_string("model", str(folder), "", flag_values=values)
    flags.DEFINE_string("mteb_out", str(tmp_path), "", flag_values=values)
    flags.DEFINE_string("dtype", "float32", "", flag_values=values)
    flags.DEFINE_string("template", "", "", flag_values=values)
    flags.DEFINE_string("moee", "", "", flag_values=values)
    flags.DEFINE_float("moee_weight", 1.0, "", flag_values=values)
    flags.DEFINE_integer("expert", None, "", flag_values=values)
    flags.DEFINE_integer("draws", 8, "", flag_values=values)
    flags.DEFINE_bool("bm25", False, "", flag_values=values)
    flags.DEFINE_bool("hybrid", False, "", flag_values=values)
    values(["evaluate", f"--mteb={NAMES[0]},{FILE}:NoData"])
    monkeypatch.setattr(flags, "FLAGS", values)
    with pytest.raises(UserError, match="--mteb=NoData: its data cannot be loaded"):
        evaluate.main()
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    score = figures["eval/mteb/LocalSTS"]
    assert ["LocalSTS", "STS", "cosine_spearman", f"{score:.2f}"] in [line.split() for line in lines]
    assert (tmp_path / "results").is_dir()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["STS21"], r"no task 'STS21', did you mean 'STS\d\d'\? \(or give FILE\.py:ClassName\)"),
        ([f"{FILE}:LocalStS"], "has no task class 'LocalStS'; it has .*LocalSTS"),
        ([NAMES[0], NAMES[0]], "two tasks are called 'LocalSTS'"),
        (["Flickr30kI2TRetrieval"], "the task has image beside text"),
    ],
)
def test_mistakes_in_names(names, message):
    with pytest.raises(UserError, match=message):
        open_tasks(names)


def test_mistakes_that_show_at_once(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no such file: .*nowhere\.py"):
        require_mteb([f"{tmp_path}/nowhere.py:Task"])
    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install mteb"):
        require_mteb(["STS12"])


def test_a_broken_file_of_tasks(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    with pytest.raises(UserError, match=r"broken\.py: ModuleNotFoundError: No module named 'no_such_module'"):
        open_tasks([f"{tmp_path}/broken.py:Task"])


def test_names_of_models(tmp_path):
    assert model_name(str(tmp_path)) == f"{tmp_path.parent.name}/{tmp_path.name}"
    assert model_name("intfloat/e5-small") == "intfloat/e5-small"
