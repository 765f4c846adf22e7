"""flash_attn under its own name: in one process, beside the package itself, and from wheels."""

import base64
import csv
import hashlib
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

MODEL = '''
"""A model as hubs keep them: it imports flash_attn at the top, whatever the machine."""
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class TinyConfig(PretrainedConfig):
    model_type = "tiny_flash"


class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.qkv = nn.Embedding(32, 24), nn.Linear(24, 72)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        batch, rows = input_ids.shape
        qkv = self.qkv(self.embed(input_ids)).view(batch, rows, 3, 3, 8)
        if attention_mask is None:
            return flash_attn_func(*qkv.unbind(2), 0.0, softmax_scale=None, causal=True)
        q, indices, cu, longest, *_ = unpad_input(qkv[:, :, 0], attention_mask)
        k, v = (index_first_axis(t.flatten(0, 1), indices) for t in qkv[:, :, 1:].unbind(2))
        out = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, 0.0, causal=True)
        return pad_input(out, indices, batch, rows)
'''

USE_MODEL = """
import sys, torch, flashtile
flashtile.install_as("flash_attn")
from transformers import AutoConfig, AutoModel
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModel.from_config(config, trust_remote_code=True)
ids, mask = torch.randint(0, 32, (2, 9)), torch.ones(2, 9, dtype=torch.long)
mask[0, :4] = 0
def manual(length):
    q, k, v = model.qkv(model.embed(ids)).double().view(2, 9, 3, 3, 8)[:, 9 - length:].unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
torch.testing.assert_close(model(ids).double(), manual(9), atol=1e-5, rtol=0)
out = model(ids, mask)
torch.testing.assert_close(out[0, 4:].double(), manual(5)[0], atol=1e-5, rtol=0)
torch.testing.assert_close(out[1].double(), manual(9)[1], atol=1e-5, rtol=0)
out.sum().backward()
assert model.qkv.weight.grad.abs().max() > 0 and not out[0, :4].any()
print("computed without CUDA:", not torch.cuda.is_available(), sys.modules["flash_attn"].__file__)
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    """What a fresh process prints; an error if it fails."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_model_of_a_hub_starts_and_computes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "modeling_tiny.py").write_text(MODEL)
    auto = '{"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}'
    (folder / "config.json").write_text(f'{{"model_type": "tiny_flash", "auto_map": {auto}}}')
    offline = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    output = run(USE_MODEL, str(folder), **offline, CUDA_VISIBLE_DEVICES="")
    assert "computed without CUDA: True" in output
    assert "drop_in/flash_attn/flash_attn" in output


def test_names_and_metadata_in_one_process(tmp_path: Path) -> None:
    """Twice, from threads, and in a namespace with others; versions as hosts look for them."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("theirs = True\n")
    run(
        """
        import concurrent.futures, importlib.metadata, importlib.util, sys, warnings
        import flashtile
        assert importlib.util.find_spec("flash_attn") is None
        sys.path.append(sys.argv[1])
        warnings.simplefilter("error")
        names = ("flash_attn", "flash_attn_interface", "flash_attn_3") * 8
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(flashtile.install_as, names)) == [None] * 24
        flashtile.install_as("flash_attn")
        assert len([p for p in sys.path if "drop_in" in p]) == 2, sys.path
        import flash_attn, flash_attn.layers.rotary, flash_attn.bert_padding
        import flash_attn_3, flash_attn_interface
        from flash_attn.flash_attn_interface import _flash_attn_forward, flash_attn_gpu
        from flashtile.integrations import flash_attn as ours, flash_attn_3 as ours_3
        assert flash_attn.flash_attn_func is ours.flash_attn_func
        assert flash_attn_interface.flash_attn_func is ours_3.flash_attn_func
        assert flash_attn_3.flash_attn_func is ours_3.flash_attn_func
        assert (flash_attn.__version__, flash_attn_interface.__version__) == ("2.8.4", "3.0.0")
        for name in ("flash_attn", "flash_attn_interface", "flash_attn_3"):
            assert importlib.util.find_spec(name) is not None
        assert importlib.metadata.version("flash-attn") == "2.8.4+flashtile"
        assert importlib.metadata.version("flash-attn-3") == "3.0.0+flashtile"
        owners = importlib.metadata.packages_distributions()
        assert owners["flash_attn"] == ["flash_attn"], owners["flash_attn"]
        assert owners["flash_attn_interface"] == ["flash_attn_3"]
        try:
            import flash_attn.ops
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError("flash_attn.ops is half there")
        import flash_attn.cute
        assert flash_attn.cute.theirs
        """,
        str(tmp_path),
    )


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A folder with packages of both names that are not ours."""
    package = tmp_path / "site" / "flash_attn"
    (package / "ops").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '2.7.0'\n")
    (package / "ops" / "__init__.py").write_text("theirs = True\n")
    info = tmp_path / "site" / "flash_attn-2.7.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash_attn\nVersion: 2.7.0\n")
    (tmp_path / "site" / "flash_attn_interface.py").write_text("theirs = True\n")
    return tmp_path / "site"


def test_beside_the_package_itself(real: Path) -> None:
    run(
        """
        import sys, warnings
        sys.path.insert(0, sys.argv[1])
        import flashtile
        import flash_attn_interface
        for _ in range(2):
            try:
                flashtile.install_as("flash_attn_3")
            except RuntimeError as error:
                place = f"{sys.argv[1]}/flash_attn_interface.py"
                assert str(error) == (
                    f"flash_attn_interface is imported from {place} already; allowed: "
                    "flashtile.install_as before anything imports it"
                ), error
            else:
                raise AssertionError("it was not refused")
        assert flash_attn_interface.theirs and "flash_attn_3" not in sys.modules
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            flashtile.install_as("flash_attn")
            flashtile.install_as("flash_attn")
        (warning,) = said
        assert str(warning.message) == (
            f"flash_attn 2.7.0 is installed at {sys.argv[1]}/flash_attn/__init__.py; in this "
            "process flashtile stands in its place"
        ), warning.message
        assert warning.filename == "<string>", warning.filename
        import flash_attn, flash_attn.ops, importlib.metadata
        assert flash_attn.__version__ == "2.8.4" and flash_attn.ops.theirs
        assert importlib.metadata.version("flash_attn") == "2.8.4+flashtile"
        """,
        str(real),
    )


def check_record(wheel: Path) -> None:
    """RECORD names every file of a wheel with its size and hash."""
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    (record,) = (name for name in contents if name.endswith(".dist-info/RECORD"))
    rows = list(csv.reader(contents[record].decode().splitlines()))
    assert sorted(row[0] for row in rows) == sorted(contents)
    for name, digest, size in rows:
        if name != record:
            algorithm, _, value = digest.partition("=")
            padded = base64.urlsafe_b64decode(value + "=" * (-len(value) % 4))
            assert hashlib.new(algorithm, contents[name]).digest() == padded
            assert int(size) == len(contents[name])


def test_wheels(tmp_path: Path) -> None:
    """pip installs both into a folder; every name is there, and install_as finds them."""
    wheels, target = tmp_path / "dist", tmp_path / "target"
    script = ROOT / "cmake" / "drop_in_wheels.py"
    subprocess.run([sys.executable, str(script), str(wheels)], check=True, capture_output=True)
    names = sorted(path.name for path in wheels.iterdir())
    assert names == [
        "flash_attn-2.8.4+flashtile-py3-none-any.whl",
        "flash_attn_3-3.0.0+flashtile-py3-none-any.whl",
    ]
    for wheel in wheels.iterdir():
        check_record(wheel)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
           "--no-compile", "--target", str(target)]  # fmt: skip
    subprocess.run([*pip, *map(str, wheels.iterdir())], check=True, capture_output=True)
    run(
        """
        import sys, importlib.metadata, warnings
        sys.path.insert(0, sys.argv[1])
        from flash_attn import flash_attn_func, flash_attn_with_kvcache
        from flash_attn.bert_padding import pad_input
        from flash_attn.layers.rotary import RotaryEmbedding
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward
        import flash_attn, flash_attn_interface, flash_attn_3, flashtile
        for module in (flash_attn, flash_attn_interface, flash_attn_3):
            assert module.__file__.startswith(sys.argv[1]), module
        for name, version in (("flash_attn", "2.8.4"), ("flash_attn_3", "3.0.0")):
            assert importlib.metadata.version(name) == f"{version}+flashtile"
            assert importlib.metadata.requires(name) == ["flashtile"]
            assert importlib.metadata.files(name)
        warnings.simplefilter("error")
        for name in ("flash_attn", "flash_attn_3"):
            flashtile.install_as(name)
        assert not [p for p in sys.path if "drop_in" in p]
        import torch
        q = torch.randn(1, 5, 2, 8)
        assert torch.equal(flash_attn_func(q, q, q, causal=True),
                           flashtile.attention(q, q, q, causal=True))
        """,
        str(target),
    )


def test_names_that_are_not_known() -> None:
    import flashtile  # noqa: PLC0415

    with pytest.raises(
        ValueError, match='name is "xformers"; allowed: "flash_attn", "flash_attn_i'
    ):
        flashtile.install_as("xformers")
    with pytest.raises(TypeError, match="name is a int; allowed: str"):
        flashtile.install_as(3)  # type: ignore[arg-type]
