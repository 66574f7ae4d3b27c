"""The recipes for routers: each finds the engines, is found by the gateways, and keeps what is about one image on one engine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import yaml
from charts import NAMESPACE, RECIPES, SETS, Resource, of_kind, one, pods, render
from support import ROOT

from ergo_server.settings import Settings

HERE = Path(__file__).parent
HEADERS: tuple[str, ...] = Settings.model_fields["session_headers"].default
OURS = "eyes"
"""The release of ergo-vqa in the recipes."""

ROUTER = "eyes-router"


def read(path: str) -> Any:
    """Return what a file of the recipes holds."""
    return yaml.safe_load((RECIPES / path).read_text())


def ours(recipe: str) -> list[Resource]:
    """Return our chart's resources with a recipe's values."""
    return render(SETS[recipe], release=OURS)


def router() -> list[Resource]:
    """Return vllm-router's resources."""
    return render({}, RECIPES / "vllm-router", ROUTER)


def labels(resource: Resource) -> dict[str, str]:
    """Return the labels of a workload's pods."""
    found: dict[str, str] = resource["spec"]["template"]["metadata"]["labels"]
    return found


def admits(peers: list[Any], labels: dict[str, str]) -> bool:
    """Say whether a policy's peers name pods of this namespace with such labels."""
    return any(peer.get("podSelector", {}).get("matchLabels", {"": ""}).items() <= labels.items() for peer in peers)


def rule(resources: list[Resource], name: str, direction: str, key: str) -> list[Any]:
    """Return the peers of all rules of a policy in a direction."""
    (found,) = of_kind(resources, "NetworkPolicy", name)
    return [peer for rule in found["spec"][direction] for peer in rule[key]]


def given(resources: list[Resource], name: str) -> str:
    """Return a variable of the gateway's."""
    value: str = one(resources, "ConfigMap", "-gateway")["data"][name]
    return value


def test_each_router_has_values_for_us() -> None:
    """A recipe is a folder with the router's own file and ours; ours are rendered and checked with all other values."""
    assert {path.name for path in RECIPES.iterdir()} == {"vllm-router", "production-stack", "llm-d", "ray-serve"}
    assert {path.name for path in RECIPES.iterdir()} < SETS.keys()


@pytest.mark.parametrize("version", ["1.27", "1.37"])
def test_kubernetes_understands_vllm_routers_chart(version: str) -> None:
    """Every resource of the router's chart is valid by Kubernetes' strict schema, and no container may more than it must."""
    for resource in router():
        kubernetes_validate.validate(resource, version, strict=True)
    for _, pod in pods(router()):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


def flags() -> list[str]:
    """Return what vllm-router is started with."""
    found: list[str] = one(router(), "Deployment")["spec"]["template"]["spec"]["containers"][0]["args"]
    return found


def test_vllm_router_finds_our_engines() -> None:
    """Its selector chooses the engines' pods of the release that values name, at their port, and it may watch them."""
    args = flags()
    at = args.index("--selector")
    selector = dict(label.split("=") for label in args[at + 1 : at + 3])
    engine = one(ours("vllm-router"), "StatefulSet", "-engine")
    assert selector.items() <= labels(engine).items()
    assert not selector.items() <= labels(one(ours("vllm-router"), "Deployment", "-gateway")).items()
    (port,) = engine["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert f"--service-discovery-port={port['containerPort']}" in args
    assert f"--service-discovery-namespace={NAMESPACE}" in args
    assert one(router(), "Role")["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
    assert one(router(), "RoleBinding")["subjects"][0]["name"] == one(router(), "ServiceAccount")["metadata"]["name"]


def test_gateways_find_vllm_router() -> None:
    """Our gateways ask the router's Service at its port, and policies let them reach it and it the engines."""
    resources, service = ours("vllm-router"), one(router(), "Service")
    assert given(resources, "ERGO_ENGINE_URL") == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    pod = labels(one(router(), "Deployment"))
    assert service["spec"]["selector"].items() <= pod.items()
    assert admits(rule(resources, "-gateway", "egress", "to"), pod)
    assert admits(rule(resources, "-engine", "ingress", "from"), pod)
    assert not admits(rule(ours("ray-serve"), "-gateway", "egress", "to"), pod)


def test_vllm_router_chooses_by_the_session() -> None:
    """Its policy is the one that hashes x-session-id, which the gateway sends."""
    assert "--policy=consistent_hash" in flags()
    assert "x-session-id" in HEADERS


def test_production_stack_chooses_by_the_session() -> None:
    """Its router hashes a header that the gateway sends, and our gateways ask the Service that the chart makes."""
    values = read("production-stack/values.yaml")
    assert (values["routerSpec"]["routingLogic"], values["routerSpec"]["sessionKey"]) == ("session", HEADERS[0])
    assert given(ours("production-stack"), "ERGO_ENGINE_URL") == "http://stack-router-service"


def test_production_stack_runs_vllm_as_we_do() -> None:
    """Its engines have the image, the flags and the context of our chart's, and keep prefixes."""
    (model,) = read("production-stack/values.yaml")["servingEngineSpec"]["modelSpec"]
    (container,) = one(render({}), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert f"{model['repository']}:{model['tag']}" == container["image"]
    theirs_to_set = re.compile("--(revision|served-model-name|host|port|max-model-len)=")
    assert set(model["vllmConfig"]["extraArgs"]) == {flag for flag in container["args"][1:] if not theirs_to_set.match(flag)}
    assert f"--max-model-len={model['vllmConfig']['maxModelLen']}" in container["args"]
    assert model["modelURL"] == container["args"][0] == given(ours("production-stack"), "ERGO_ENGINE_MODEL")
    assert model["vllmConfig"]["enablePrefixCaching"] is True


@pytest.mark.parametrize(
    ("path", "image"), [("production-stack/values.yaml", "routerSpec"), ("llm-d/router.yaml", "router.epp.image")]
)
def test_a_routers_image_has_a_version(path: str, image: str) -> None:
    """The router's image has the tag of the version whose chart the page installs, not one that moves."""
    values = read(path)
    for key in image.split("."):
        values = values[key]
    (line,) = [line for line in (ROOT / "docs/scaling.md").read_text().splitlines() if f"/{path}" in line]
    (version,) = re.findall(r" --version (\S+) ", line)
    assert re.fullmatch(r"v\d+\.\d+\.\d+", values["tag"])
    assert values["tag"].removeprefix("v") == version.removeprefix("v")
    assert f" --version {version} " in (RECIPES / path).read_text()


def picker() -> dict[str, Any]:
    """Return the endpoint picker's configuration."""
    epp = read("llm-d/router.yaml")["router"]["epp"]
    found: dict[str, Any] = yaml.safe_load(epp["pluginsCustomConfig"][epp["pluginsConfigFile"]])
    return found


def test_llm_d_chooses_by_the_session_first() -> None:
    """The picker reads a header that the gateway sends, every plugin used is declared, and the session outweighs the rest."""
    declared = {plugin["type"]: plugin.get("parameters", {}) for plugin in picker()["plugins"]}
    (profile,) = picker()["schedulingProfiles"]
    weights = {plugin["pluginRef"]: plugin.get("weight", 0) for plugin in profile["plugins"]}
    assert weights.keys() <= declared.keys()
    session = weights.pop("session-affinity-scorer")
    assert session > sum(weights.values()) > 0
    parameters = declared["session-affinity-scorer"]
    assert parameters["strategy"] == "session_id"
    assert [source["header"] for source in parameters["sessionIdConfig"]["sources"]] == [HEADERS[0]]


def test_llm_d_finds_our_engines() -> None:
    """The pool chooses our engines' pods at their port; the route leads to the pool, by the Gateway that our gateways ask."""
    servers = read("llm-d/router.yaml")["router"]["modelServers"]
    resources = ours("llm-d")
    engine = one(resources, "StatefulSet", "-engine")
    assert servers["matchLabels"].items() <= labels(engine).items()
    assert [port["number"] for port in servers["targetPorts"]] == [8001]
    entry, route = yaml.safe_load_all((RECIPES / "llm-d/route.yaml").read_text())
    for resource in (entry, route):
        schema = json.loads((HERE / "crds" / f"{resource['kind']}.json").read_text())
        jsonschema.Draft202012Validator(schema).validate(resource)
    # Without its name llm-d's chart makes nothing that this Gateway's implementation needs to reach the picker.
    assert read("llm-d/router.yaml")["provider"]["name"] == entry["spec"]["gatewayClassName"]
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    assert f"helm install {backend['name']} " in (RECIPES / "llm-d/router.yaml").read_text()
    assert route["spec"]["parentRefs"] == [{"name": entry["metadata"]["name"]}]
    host = urlsplit(given(resources, "ERGO_ENGINE_URL")).hostname
    assert host == f"{entry['metadata']['name']}-{entry['spec']['gatewayClassName']}"
    proxy = {"gateway.networking.k8s.io/gateway-name": entry["metadata"]["name"]}
    assert admits(rule(resources, "-gateway", "egress", "to"), proxy)
    assert admits(rule(resources, "-engine", "ingress", "from"), proxy)
    # The label that llm-d's chart gives the picker's pods: the release, and `-epp`.
    assert admits(rule(resources, "-engine", "ingress", "from"), {"llm-d-router-gateway": f"{backend['name']}-epp"})


def test_ray_serve_runs_vllm_as_we_do_and_chooses_by_the_session() -> None:
    """Its router is the consistent hash over the session, read from x-session-id, and vLLM's arguments are our chart's."""
    config = read("ray-serve/serve.yaml")
    (model,) = config["applications"][0]["args"]["llm_configs"]
    assert model["deployment_config"]["request_router_config"]["request_router_class"].endswith(".ConsistentHashRouter")
    assert "x-session-id" in HEADERS
    args = dict(
        flag.lstrip("-").partition("=")[::2]
        for flag in one(render({}), "StatefulSet")["spec"]["template"]["spec"]["containers"][0]["args"]
    )
    assert model["engine_kwargs"]["load_format"] == "safetensors"
    for name, value in model["engine_kwargs"].items():
        told = args[name.replace("_", "-")]
        if isinstance(value, list):
            written = ",".join(value)
        elif value is True:
            written = ""
        else:
            written = json.dumps(value) if isinstance(value, dict) else str(value)
        assert written.replace(" ", "") == told
    url = urlsplit(given(ours("ray-serve"), "ERGO_ENGINE_URL"))
    assert url.port == config["http_options"]["port"]
    assert given(ours("ray-serve"), "ERGO_ENGINE_MODEL") == model["model_loading_config"]["model_id"]
