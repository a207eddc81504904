"""Model references and the digests of model folders; no torch."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsekd.artifact import sha256_of_file
from sparsekd.model_reference import resolve, weights_identity

FILES = ("model.safetensors", "config.json", "tokenizer.json", "vocab.txt", "1_Pooling/config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder laid out like a saved model; the bytes need not be one."""
    return make_folder(tmp_path / "model")


def make_folder(folder: Path) -> Path:
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"file": "{name}"}}', encoding="utf-8")
    return folder


def test_local_folder_resolves_to_itself(folder: Path) -> None:
    found = resolve(str(folder))

    assert (found.path, found.revision) == (folder, None)


def test_package_resolves_by_distribution_and_by_module_name_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "my_model_package"
    make_folder(package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    info = tmp_path / "my_distribution-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-distribution\nVersion: 1.0\n", encoding="utf-8")
    (info / "RECORD").write_text("my_model_package/__init__.py,,\nmy_model_package/model/config.json,,\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()

    by_distribution, by_module = resolve("package:my-distribution"), resolve("package:my_model_package")

    assert by_distribution.path == by_module.path == package / "model"


@pytest.mark.parametrize(("names", "found"), [((), "none"), (("small", "large"), "large.*small")])
def test_package_without_exactly_one_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], found: str
) -> None:
    name = f"package_of_{len(names)}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    for model in names:
        make_folder(tmp_path / name / model)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()

    with pytest.raises(ValueError, match=f"expected one folder with a config.json inside the package, found .*{found}"):
        resolve(f"package:{name}")


@pytest.mark.parametrize(
    "reference",
    ["package:no-such-package", "package:", "./no/such/folder", "/no/such", "~nobody/x", "org/none@v1", "none", "a b", "-rf"],
)
def test_unreachable_reference_names_the_three_forms(reference: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"package:NAME .* local folder, or a hub id ORG/NAME with optional @REVISION"):
        resolve(reference)


def test_cached_hub_id_resolves_offline_with_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--name"
    make_folder(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    code = (
        "from sparsekd.model_reference import resolve; import sys\n"
        "found = [resolve('org/name'), resolve('org/name@main')]\n"
        "print(*(model.revision for model in found), 'torch' in sys.modules)"
    )  # in a process of its own: huggingface_hub reads its cache folder once
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    assert done.stdout.split() == [commit, commit, "False"]


def test_a_snapshot_fetched_without_pickles_is_found_without_the_network(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--name"
    make_folder(repository / "snapshots" / commit)
    for folder in ("refs", "trees"):
        (repository / folder).mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    # the hub's listing, which huggingface_hub keeps: it holds a file that is never fetched
    listed = {name: {"size": 1, "blob_id": "0" * 40} for name in (*FILES, "pytorch_model.bin")}
    tree = {"format_version": 1, "files": listed}
    (repository / "trees" / f"{commit}.json").write_text(json.dumps(tree), encoding="utf-8")
    code = (
        "import sys\n"
        "def refuse(event, _):\n"
        "    if event in ('socket.getaddrinfo', 'socket.connect'): raise RuntimeError(event)\n"
        "sys.addaudithook(refuse)\n"
        "from sparsekd.model_reference import resolve\n"
        "print(resolve('org/name').revision)"
    )  # online, as a user runs it: offline, a download would quietly return the same folder
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}

    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)

    assert (done.stdout.strip(), done.stderr) == (commit, "")


def test_identity_is_the_digest_of_every_deciding_file(folder: Path) -> None:
    assert weights_identity(folder) == {name: sha256_of_file(folder / name) for name in sorted(FILES)}


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_changes_the_identity(folder: Path, name: str) -> None:
    before = weights_identity(folder)

    content = bytearray((folder / name).read_bytes())
    content[2] ^= 1  # a letter: what loaders obey must stay JSON
    (folder / name).write_bytes(content)

    assert weights_identity(folder) != before


@pytest.mark.parametrize("name", ["modeling_custom.py", "chat_template.jinja", "spiece.model", "2_Dense/model.safetensors"])
def test_an_added_deciding_file_changes_the_identity(folder: Path, name: str) -> None:
    before = weights_identity(folder)

    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x", encoding="utf-8")

    assert weights_identity(folder) == {**before, name: sha256_of_file(folder / name)}


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "LICENSE.txt",
        ".gitattributes",
        ".cache/huggingface/x.json",
        "onnx/config.json",
        "openvino/model.safetensors",
        "pytorch_model.bin",
        "training_args.bin",
        "trainer_state.json",
        "checkpoint-100/model.safetensors",
        "eval/similarity.json",
        "manifest.json",
        "training.json",
        "__pycache__/x.py",
    ],
)
def test_files_without_influence_are_left_out(folder: Path, name: str) -> None:
    before = weights_identity(folder)

    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x", encoding="utf-8")

    assert weights_identity(folder) == before


def test_moved_and_touched_folder_keeps_its_identity(folder: Path) -> None:
    before = weights_identity(folder)

    moved = folder.rename(folder.with_name("elsewhere"))
    os.utime(moved / "model.safetensors", (0, 0))

    assert weights_identity(moved) == before


def test_pickled_weights_alone_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle .* expected safetensors"):
        weights_identity(folder)


def test_a_module_with_pickled_weights_only_is_refused(folder: Path) -> None:
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "pytorch_model.bin").touch()

    with pytest.raises(ValueError, match=r"2_Dense/pytorch_model.bin is a pickle"):
        weights_identity(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    with pytest.raises(ValueError, match=r"no \*.safetensors weights among 4 files"):
        weights_identity(folder)


def test_an_adapter_without_its_base_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")

    with pytest.raises(ValueError, match=r"an adapter .* expected a whole model; merge it"):
        weights_identity(folder)


def test_an_adapter_inside_a_module_is_refused(folder: Path) -> None:
    (folder / "1_Pooling" / "adapter_config.json").write_text("{}", encoding="utf-8")

    with pytest.raises(ValueError, match=r"an adapter \(1_Pooling/adapter_config\.json\)"):
        weights_identity(folder)


def test_other_safetensors_do_not_cover_a_pickle_that_loaders_would_take(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model-00001-of-00002.bin").touch()

    with pytest.raises(ValueError, match=r"pytorch_model-00001-of-00002\.bin is a pickle"):
        weights_identity(folder)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modules.json", '[{"path": "../other"}]', "modules.json names '../other'; expected files inside the model's folder"),
        ("modules.json", '[{"path": "/other"}]', "modules.json names '/other'; expected files inside"),
        ("modules.json", '[{"path": 7}]', "modules.json names '7'; expected files inside"),
        ("modules.json", '["x"]', "modules.json holds a JSON list; expected a list of modules; save it again"),
        ("modules.json", "{}", "modules.json holds a JSON dict; expected a list of modules"),
        (INDEX, '{"weight_map": {"a": "../../b.safetensors"}}', f"{INDEX} names '../../b.safetensors'; expected files inside"),
        (INDEX, '{"weight_map": 7}', f"{INDEX} names '7'; expected files inside"),
        ("config.json", '{"a": ', "config.json is no JSON (Expecting value: line 1 column 7 (char 6)); expected a saved model's"),
        ("config.json", b"\xff", "config.json is no JSON ('utf-8' codec can't decode byte 0xff in position 0"),
        ("config.json", "[" * 100_000, "config.json is no JSON (maximum recursion depth exceeded"),
        ("config.json", "[]", "config.json holds a JSON list; expected an object; save it again"),
        ("tokenizer_config.json", "", "tokenizer_config.json is no JSON (Expecting value"),
    ],
)
def test_what_loaders_would_obey_is_checked_before_they_do(folder: Path, name: str, content: str | bytes, message: str) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(ValueError, match="expected") as caught:
        weights_identity(folder)

    assert str(caught.value).startswith(f"model {folder}: {message}")
