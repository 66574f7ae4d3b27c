"""The chart, rendered: by helm where it is there, else by the same template engine."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from support import ROOT

CHART = ROOT / "helm" / "ergo-vqa"
RECIPES = ROOT / "helm" / "recipes"
RENDERER = ROOT / ".cache" / "helm-render"
SETS = (
    {"defaults": {}}
    | {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "tests/helm/values").glob("*.yaml"))}
    | {path.parent.name: yaml.safe_load(path.read_text()) for path in sorted(RECIPES.glob("*/ergo-vqa.yaml"))}
)
"""Values of several clusters, those of the recipes among them."""

RELEASE, NAMESPACE = "demo", "vision"

Values = dict[str, Any]
Resource = dict[str, Any]


class ChartError(Exception):
    """The values are refused, by schema or by templates; the message says why."""


def over(base: Values, values: Values) -> Values:
    """Lay values over others, as helm does: mappings are merged, null takes away, all else replaces."""
    found = copy.deepcopy(base)
    for key, value in values.items():
        if value is None:
            found.pop(key, None)
        elif isinstance(value, dict) and isinstance(found.get(key), dict):
            found[key] = over(found[key], value)
        else:
            found[key] = value
    return found


def render(values: Values, chart: Path = CHART, release: str = RELEASE) -> list[Resource]:
    """Return what a chart makes of values, in the order of its templates.

    Raises:
        ChartError: it makes nothing of them.
    """
    return copy.deepcopy(_rendered(json.dumps(values), chart, release))


@functools.cache
def _rendered(values: str, chart: Path, release: str) -> list[Resource]:
    helm = shutil.which("helm")
    if helm is None and not RENDERER.exists():
        pytest.skip("neither helm nor .cache/helm-render here: tests/helm/install.sh makes it")
    if helm is None and (chart / "values.schema.json").exists():  # helm checks the schema itself
        default = yaml.safe_load((chart / "values.yaml").read_text())
        schema = json.loads((chart / "values.schema.json").read_text())
        for fault in jsonschema.Draft7Validator(schema).iter_errors(over(default, json.loads(values))):
            raise ChartError(f"{fault.json_path}: {fault.message}")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(values)
        file.flush()
        command = [helm or str(RENDERER), "template", release, str(chart), "--namespace", NAMESPACE, "--values", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChartError(done.stderr)
    return [document for document in yaml.load_all(done.stdout, _Unique) if document]


class _Unique(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses a key that is written twice, which YAML forbids and PyYAML overlooks."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"written twice: {sorted(keys)}"
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def one(resources: list[Resource], kind: str, name: str = "") -> Resource:
    """Return the only resource of a kind whose name ends so."""
    (found,) = of_kind(resources, kind, name)
    return found


def of_kind(resources: list[Resource], kind: str, name: str = "") -> list[Resource]:
    """Return the resources of a kind whose names end so."""
    return [resource for resource in resources if resource["kind"] == kind and resource["metadata"]["name"].endswith(name)]


def pods(resources: list[Resource]) -> Iterator[tuple[str, Resource]]:
    """Yield name and spec of all that becomes a pod."""
    for resource in resources:
        if resource["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield resource["metadata"]["name"], resource["spec"]["template"]["spec"]
        elif resource["kind"] == "Pod":
            yield resource["metadata"]["name"], resource["spec"]
