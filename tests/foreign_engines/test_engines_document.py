"""The examples in docs/ENGINES.md work with the code."""

import ast
import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from antefix_console.cli import main
from antefix_engines.engine_store import StoreSettings
from antefix_engines.sglang.settings import HiCacheSettings
from antefix_engines.vllm.tier_settings import TierSettings
from tests.foreign_engines import vllm_stand_in

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "ENGINES.md").read_text()
README = (ROOT / "README.md").read_text()
SOURCES = ROOT / "engines"


def blocks_of(language="", document=DOCUMENT):
    """The document's code blocks, which lie between pairs of fences."""
    pieces = [piece.partition("\n") for piece in document.split("```")[1::2]]
    return [text for first, _, text in pieces if first == language]


def json_behind(flag, document=DOCUMENT):
    """The JSON after a flag in a command, quoted for a shell."""
    (found,) = [block for block in blocks_of(document=document) if flag in block]
    return json.loads(re.search(rf"{flag} '(\{{.*?\}})'", found, re.DOTALL)[1])


def defines(module, name):
    path = SOURCES / f"{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text())
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body)


@pytest.mark.parametrize("document", [DOCUMENT, README], ids=["ENGINES", "README"])
def test_vllms_configuration_is_taken(document):
    told = json_behind("--kv-transfer-config", document)
    extra = told["kv_connector_extra_config"]
    (tier,) = extra["secondary_tiers"]
    assert told["kv_connector"] == "OffloadingConnector"
    assert defines(extra["spec_module_path"], extra["spec_name"]) and defines(tier["module_path"], tier["type"])
    settings = TierSettings.from_mapping({name: tier[name] for name in tier if name not in ("type", "module_path")})
    assert settings.is_local and settings.weights_revision


def test_vllms_configuration_with_a_service_is_taken():
    remote = re.search(r'With (`"address".*?`) instead of `directory`', DOCUMENT)[1].strip("`")
    assert not TierSettings.from_mapping(json.loads("{" + remote + "}")).is_local


def test_sglangs_configuration_is_taken():
    told = json_behind("--hicache-storage-backend-extra-config")
    assert defines(told["module_path"], told["class_name"])
    # SGLang removes this field before it passes on the rest.
    assert told.pop("hicache_storage_pass_prefix_keys") is True
    settings = HiCacheSettings.of(SimpleNamespace(extra_config=told, model_name="model", tp_size=1, pp_size=1))
    assert settings.store.address and settings.weights_revision


def test_lmcaches_configuration_is_taken():
    (block,) = [each for each in blocks_of() if "AntefixL2Adapter" in each]
    told = json.loads(block)
    assert told["type"] == "plugin" and defines(told["module_path"], told["class_name"])
    parameters = dict(told["adapter_params"])
    assert parameters.pop("weights_revision") and StoreSettings.from_mapping(parameters).address


def test_python_in_it_parses():
    assert blocks_of("python")
    for block in blocks_of("python"):
        ast.parse(block)


def test_commands_about_certificates_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [
        line.split() for block in blocks_of() for line in block.splitlines() if line.startswith("antefix certs")
    ]
    assert len(commands) == 2 and main(["certs", "init", "CA"]) == 0
    (tmp_path / "antefix-data").mkdir()
    (tmp_path / "antefix-data" / "secret").touch(0o600)
    (tmp_path / "antefix-data" / "secret").write_text("ab" * 32)
    assert [main(command[1:]) for command in commands] == [0, 0]


@pytest.mark.parametrize(
    ("title", "settings"),
    [("## What is shared", StoreSettings), ("## vLLM", TierSettings), ("## SGLang", HiCacheSettings)],
)
def test_each_setting_is_told(title, settings):
    section = DOCUMENT[DOCUMENT.index(title) :].split("\n## ")[0] if title != "## What is shared" else DOCUMENT
    rows = re.findall(r"^\| ([a-z_0-9, ]+) \|", section, re.MULTILINE)
    told = {name.strip() for row in rows for name in row.split(",")}
    assert {field.name for field in dataclasses.fields(settings)} - {"store"} <= told


def test_each_metric_of_the_tier_begins_as_it_says():
    with vllm_stand_in.stand_in() as modules:
        defined = modules.tier.AntefixTier.build_metric_definitions({})
    assert defined and all(name.startswith("antefix_vllm_") for name in defined)
    assert "`antefix_vllm_*`" in DOCUMENT
