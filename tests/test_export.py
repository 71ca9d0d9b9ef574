"""Exported folders: sentence-transformers gives the same vectors, and the fingerprint catches what changed."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_embedder import make
from tiny_run import sentence, tiny_config, train_on, write_pairs

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.export import export_model
from jaxembed.models.pooling import MODES
from jaxembed.verification import FINGERPRINT, TEXTS, TOLERANCE, verify

sentence_transformers = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")

PROMPTS = {"query": "kaka lolo: ", "document": "mimi: "}
ODD = (
    "",
    " ",
    "\n\t  \r\n",
    "\u200b\ufeff",
    "a",
    "?!",
    "\x00\x01\x02 control \x1b[31m characters \x7f",
    "tab\tseparated\u00a0and\u2028odd\u3000spaces",
    "مرحبا بالعالم، كيف حالك؟",
    "שלום עולם",
    "\u202eright to left override\u202c",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 😀😀😀",
    "東京は日本の首都です。",
    "naïve café — “quoted” … ﬁne",
    "e\u0301 is not é",
    "ZA͡LGO̸ t̷e̷x̷t",
    "[CLS] [SEP] [MASK] [PAD] [UNK]",
    "</s><s> <|endoftext|>",
    "word" * 200,
    "long " * 1000,
    "1234567890 " * 60,
    "http://example.org/?q=a&b=%20c#d",
)


def odd_texts() -> list[str]:
    """100 texts: the list above, and its short ones joined with one another and with plain words."""
    rng = np.random.default_rng(0)
    short = [text for text in ODD if len(text) < 100]
    joined = [
        f"{rng.choice(short)}{sentence(rng) if rng.random() < 0.7 else ''} {rng.choice(short)}"
        for _ in range(100 - len(ODD))
    ]
    return [*ODD, *joined]


def there(folder):
    return sentence_transformers.SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"}
    )


@pytest.fixture(scope="module")
def tuned(minilm_dir, tmp_path_factory):
    """The workdir of a short fine-tuning of the real MiniLM."""
    folder = tmp_path_factory.mktemp("tuned")
    config = tiny_config(
        folder,
        steps=2,
        batch_size=8,
        model__init=f"hf:{minilm_dir}",
        model__arch="auto",
        model__shape={},
        tokenizer="auto",
        prompts=PROMPTS,
        data__train=({"path": str(write_pairs(folder / "pairs.jsonl", 40, 1))},),
    )
    train_on(1, config, folder / "run")
    return folder / "run"


def test_after_fine_tuning_sentence_transformers_gives_the_same_vectors(tuned):
    texts = odd_texts()
    ours, theirs = Embedder.load(tuned), there(tuned / "export")
    for how in ({}, {"prompt_name": "query"}):
        difference = np.abs(ours.encode(texts, **how) - theirs.encode(texts, **how))
        assert difference.max() <= 1e-5, texts[int(difference.max(1).argmax())]
    assert theirs.prompts == ours.blueprint.prompts and theirs.max_seq_length == ours.blueprint.max_length
    assert theirs.get_embedding_dimension() == ours.width == 384


def test_after_fine_tuning_transformers_misses_nothing(tuned):
    model, info = transformers.AutoModel.from_pretrained(tuned / "export", output_loading_info=True)
    assert type(model).__name__ == "BertModel"
    assert not any(info.values()), info


def test_the_export_of_a_run_is_what_the_run_gives(tuned):
    texts = odd_texts()[:40]
    np.testing.assert_allclose(
        Embedder.load(tuned / "export").encode(texts), Embedder.load(tuned).encode(texts), atol=1e-6
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.mark.parametrize(
    ("pooling", "projection", "pool_prompt"),
    [(mode, 12 * (i % 2), bool((i + j) % 2)) for j, mode in enumerate(MODES) for i in range(2)],
)
def test_every_head_agrees_with_sentence_transformers(folder, pooling, projection, pool_prompt):
    head = {"model__pooling": pooling, "model__projection": projection, "model__pool_prompt": pool_prompt}
    mesh = sharding.make_mesh(MeshConfig(1), jax.devices()[:1])
    ours = make(folder, mesh, prompts=PROMPTS, model__normalize=bool(projection), loss__temperature=1.0, **head)
    out = folder / f"{pooling}-{projection}-{pool_prompt}"
    ours.save(out)
    theirs = there(out)
    rng = np.random.default_rng(3)
    texts = [sentence(rng, 1, 20) for _ in range(20)] + ["", "vuvu " * 60, "😀"]
    scale = np.abs(ours.encode(texts)).max()
    for ask in (
        lambda model: model.encode(texts),
        lambda model: model.encode(texts, prompt_name="query"),
        lambda model: model.encode_query(texts),
        lambda model: model.encode_document(texts),
        lambda model: model.encode(texts, prompt="nini "),
    ):
        assert np.abs(ask(ours) - ask(theirs)).max() <= 1e-5 * scale
    assert ours.width == theirs.get_embedding_dimension() == (projection or 32)
    assert np.abs(Embedder.load(out, mesh=mesh).encode_query(texts) - ours.encode_query(texts)).max() <= 1e-6 * scale


@pytest.fixture(scope="module")
def good(folder):
    make(folder, prompts=PROMPTS).save(folder / "good")
    return folder / "good"


def test_a_good_folder_verifies(good):
    fingerprint = json.loads((good / FINGERPRINT).read_text())
    assert len(TEXTS) == 8 and fingerprint["texts"] == list(TEXTS)
    assert np.array(fingerprint["vectors"]).shape == (8, 32)
    differences = verify(good)
    assert set(differences) == {"jax", "sentence_transformers", "padded"}
    assert all(0 <= value <= TOLERANCE for value in differences.values())


def test_a_changed_weight_is_found(good):
    weights = good / "model.safetensors"
    before = weights.read_bytes()
    tensors = load_file(weights)
    tensors["encoder.layer.1.output.dense.weight"][3, 5] += 0.1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"vectors differ from the fingerprint: jax by .* sentence_transformers by"):
        verify(good)
    weights.write_bytes(before)
    verify(good)


def test_a_folder_without_fingerprint_cannot_be_verified(minilm_dir):
    with pytest.raises(UserError, match=f"no {FINGERPRINT} in it"):
        verify(minilm_dir)


def test_a_broken_fingerprint_is_named(good, tmp_path):
    for text in ("{", "[]", '{"texts": ["a"]}', '{"texts": ["a"], "vectors": "x"}'):
        (tmp_path / FINGERPRINT).write_text(text)
        with pytest.raises(UserError, match=FINGERPRINT):
            verify(tmp_path)


def test_the_command_exports_a_run_and_refuses_to_replace_other_folders(folder, tmp_path):
    config = tiny_config(folder, steps=2, data__train=({"path": str(write_pairs(folder / "pairs.jsonl", 80, 1))},))
    train_on(1, config, folder / "run")
    command = [sys.executable, "-m", "jaxembed.export", f"--workdir={folder}/run@2", f"--out={tmp_path}/out"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {"exported": f"{tmp_path}/out"}
    ours, again = (load_file(out / "model.safetensors") for out in (folder / "run" / "export", tmp_path / "out"))
    assert ours.keys() == again.keys() and all((ours[name] == again[name]).all() for name in ours)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=f"{tmp_path}/mine"):
        export_model(Embedder.load(folder / "run"), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
