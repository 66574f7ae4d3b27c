"""The chart: valid for every cluster that it is meant for, and saying what the gateway and vLLM really understand."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import asking
import charts
import httpx2
import jsonschema
import kubernetes_validate
import pytest
import queries
import support
import yaml
from charts import CHART, NAMESPACE, RECIPES, RELEASE, SETS, ChartError, Resource, Values, of_kind, one, pods, render
from composition import composition, engine_flags, example
from support import ROOT, VLLM, why_no_vllm

from ergo_server import __version__
from ergo_server.settings import Settings

KUBERNETES = ("1.27", "1.37")
"""Oldest and newest that the resources are checked against."""

CRDS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "crds").glob("*.json")}

every_set = pytest.mark.parametrize("values", SETS.values(), ids=SETS)


def refused(values: Values) -> str:
    """Return why values are refused."""
    with pytest.raises(ChartError) as caught:
        render(values)
    return str(caught.value)


def environment(resources: list[Resource]) -> dict[str, str]:
    """Return the gateway's environment; secrets are in files."""
    given: dict[str, str] = one(resources, "ConfigMap", "-gateway")["data"]
    return given


def container_of(resources: list[Resource], kind: str, name: str) -> dict[str, Any]:
    """Return the only container of a workload's pods."""
    (found,) = one(resources, kind, name)["spec"]["template"]["spec"]["containers"]
    given: dict[str, Any] = found
    return given


def arguments(resources: list[Resource]) -> list[str]:
    """Return vLLM's command line."""
    container = container_of(resources, "StatefulSet", "-engine")
    found: list[str] = container["command"] + container["args"]
    return found


def flags(command: list[str]) -> dict[str, str]:
    """Return the flags of a command line with their values."""
    return dict(argument.partition("=")[::2] for argument in command if argument.startswith("--"))


# --- Valid ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES)
@every_set
def test_kubernetes_understands_every_field(values: Values, version: str) -> None:
    """Every resource is one of Kubernetes' own and valid by its strict schema, or one of the four others and valid by ours."""
    for resource in render(values):
        if resource["kind"] in CRDS:
            jsonschema.Draft202012Validator(CRDS[resource["kind"]]).validate(resource)
        else:
            kubernetes_validate.validate(resource, version, strict=True)


def test_a_field_that_there_is_not_is_found() -> None:
    """The check above sees a misspelt field, in a resource of Kubernetes' and in one of the others."""
    resources = render(SETS["keda"])
    deployment, scaled = one(resources, "Deployment", "-gateway"), one(resources, "ScaledObject", "-gateway")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES[-1], strict=True)
    scaled["spec"]["triggers"][0]["metadata"]["threshold"] = 5
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(CRDS["ScaledObject"]).validate(scaled)


@every_set
def test_resources_find_each_other(values: Values) -> None:
    """Names are unique by kind; each selector finds one workload, and what is named is there, or values say that it exists."""
    resources = render(values)
    names = [(resource["kind"], resource["metadata"]["name"]) for resource in resources]
    assert len(names) == len(set(names))
    workloads = of_kind(resources, "Deployment") + of_kind(resources, "StatefulSet")
    for resource in of_kind(resources, "Service") + of_kind(resources, "PodDisruptionBudget"):
        selector = resource["spec"]["selector"]
        chosen = selector.get("matchLabels", selector)
        hits = [w for w in workloads if chosen.items() <= w["spec"]["template"]["metadata"]["labels"].items()]
        assert len(hits) == 1
    for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        for scaler in of_kind(resources, kind):
            target = scaler["spec"]["scaleTargetRef"]
            assert (target["kind"], target["name"]) in names
            assert "replicas" not in one(resources, target["kind"], target["name"])["spec"]
    said = json.dumps(values)
    own = {
        workload["metadata"]["name"]: [claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())]
        for workload in workloads
    }
    for workload in of_kind(resources, "StatefulSet"):
        assert one(resources, "Service", workload["spec"]["serviceName"])["spec"]["clusterIP"] == "None"
    for name, pod in pods(resources):
        for volume in pod["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in names or f'"{claim["claimName"]}"' in said
            for kind, key in (("Secret", "secretName"), ("ConfigMap", "name")):
                if source := volume.get(kind[0].lower() + kind[1:]):
                    assert (kind, source[key]) in names or f'"{source[key]}"' in said
        for container in pod["containers"]:
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]} | set(own.get(name, ()))
            for source in container.get("envFrom", ()):
                assert ("ConfigMap", source["configMapRef"]["name"]) in names
            for variable in container.get("env", ()):
                if secret := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert ("Secret", secret["name"]) in names or f'"{secret["name"]}"' in said


def test_the_chart_asks_for_a_cluster_that_is_tested() -> None:
    """Both charts install on no Kubernetes older than the oldest whose schemas their resources are checked against."""
    for chart in (CHART, RECIPES / "vllm-router"):
        assert yaml.safe_load((chart / "Chart.yaml").read_text())["kubeVersion"] == f">={KUBERNETES[0]}.0-0"


def test_what_install_prints_is_rendered(tmp_path: Path) -> None:
    """NOTES.txt is rendered with the rest, so every set of values tries it: an error in it is an error of the chart."""
    chart = shutil.copytree(CHART, tmp_path / "chart")
    render({}, chart, "whole")
    with (chart / "templates" / "NOTES.txt").open("a") as notes:
        notes.write('{{ fail "in the notes" }}')
    with pytest.raises(ChartError, match="in the notes"):
        render({}, chart, "broken")


@every_set
def test_a_release_of_any_name_is_valid(values: Values) -> None:
    """A long name of one's own is cut so that every name made from it is one that Kubernetes takes."""
    for resource in render(charts.over(values, {"fullnameOverride": "n" * 60})):
        assert len(resource["metadata"]["name"]) <= 63 or resource["kind"] in ("ConfigMap", "PrometheusRule")
        # A StatefulSet's pods get a label of its name, a hyphen and ten letters.
        assert len(resource["metadata"]["name"]) <= 52 or resource["kind"] != "StatefulSet"


# --- Values ---------------------------------------------------------------------------------------------------------------------


def test_the_schema_is_what_the_program_writes(tmp_path: Path) -> None:
    """values.schema.json is, to the byte, what helm/schema.py makes of the comments and of Settings."""
    subprocess.run([sys.executable, ROOT / "helm" / "schema.py", tmp_path / "out"], check=True)
    assert (tmp_path / "out").read_text() == (CHART / "values.schema.json").read_text()


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"gatway": {}}, "gatway"),
        ({"gateway": {"replicas": "two"}}, "replicas"),
        ({"gateway": {"settings": {"max_queue": 4}}}, "max_queue"),
        ({"gateway": {"settings": {"max_queued": -1}}}, "max_queued"),
        ({"gateway": {"settings": {"api_keys": "secret"}}}, "api_keys"),
        ({"gateway": {"image": {"digest": "latest"}}}, "digest"),
        ({"gateway": {"autoscaling": {"kind": "cpu"}}}, "kind"),
        ({"engine": {"autoscaling": {"minReplicas": 0}}}, "minReplicas"),
        ({"networkPolicy": {"dnsPorts": []}}, "dnsPorts"),
        ({"engine": {"enabled": False, "external": {"urls": ["http://a,http://b"]}}}, "urls"),
        ({"engine": {"enabled": False, "external": {"urls": ["http://a", "http://a"]}}}, "urls"),
        ({"engine": {"routerUrl": "router:8080"}}, "routerUrl"),
    ],
)
def test_the_schema_refuses_what_means_nothing(values: Values, word: str) -> None:
    """A misspelt value, one of a wrong type or out of bounds, and a setting that the gateway lacks, are refused by name."""
    # The name is what helm tells as well as jsonschema; helm does not repeat the value.
    assert word in refused(values)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"gateway": {"termination": {"drainSeconds": 137}}}, "gateway.termination"),
        ({"gateway": {"termination": {"preStopSeconds": 27}}}, "gateway.termination"),
        ({"engine": {"termination": {"gracePeriodSeconds": 65}}}, "engine.termination"),
        ({"engine": {"enabled": False}}, "external.urls"),
        ({"engine": {"external": {"urls": ["http://a"]}}}, "not both"),
        ({"engine": {"enabled": False, "external": {"urls": ["http://a"]}, "routerUrl": "http://b"}}, "routerUrl"),
        ({"gateway": {"settings": {"max_images": 9}}}, "engine.maxImages"),
        ({"engine": {"maxImages": Settings.model_fields["max_images"].default}}, "gateway.settings.max_images"),
        ({"gateway": {"prompts": {"content": "a", "existingConfigMap": "b"}}}, "gateway.prompts"),
        ({"gateway": {"autoscaling": {"kind": "keda"}}}, "keda.prometheus"),
        ({"gateway": {"autoscaling": {"kind": "hpa", "minReplicas": 11}}}, "minReplicas"),
        ({"gateway": {"apiKeys": {"existingSecret": "keys"}}}, "tests"),
        (
            {
                "gateway": {"apiKeys": {"existingSecret": "k"}},
                "tests": {"enabled": False},
                "monitoring": {"serviceMonitor": {"enabled": True}},
            },
            "serviceMonitor",
        ),
        ({"gateway": {"httpRoute": {"enabled": True}}}, "parentRefs"),
    ],
)
def test_the_templates_refuse_what_cannot_work(values: Values, why: str) -> None:
    """Values that contradict each other are refused with the names of those that must change."""
    assert why in refused(values)


def test_what_just_fits_is_taken() -> None:
    """A second or an image less than what is refused above renders: the bounds are where they are said to be. Engines that others
    run are told nothing of images, so there is no bound."""
    render({"gateway": {"termination": {"drainSeconds": 136}}, "engine": {"termination": {"gracePeriodSeconds": 66}}})
    render({"gateway": {"settings": {"max_images": 11}}, "engine": {"maxImages": 12}})
    render({"engine": {"maxImages": Settings.model_fields["max_images"].default + 1}})
    render({"gateway": {"settings": {"max_images": 11}}, "engine": {"enabled": False, "external": {"urls": ["http://a"]}}})


@every_set
def test_pods_have_time_to_end(values: Values) -> None:
    """Each pod has longer than its program may take: 3 s more than grace and drain, and vLLM's own time-out."""
    resources = render(values)
    given = environment(resources)
    gateway = one(resources, "Deployment", "-gateway")["spec"]["template"]["spec"]
    drain = float(given["ERGO_DRAIN_GRACE_SECONDS"]) + float(given["ERGO_DRAIN_SECONDS"])
    assert drain + 3 < gateway["terminationGracePeriodSeconds"]
    assert float(given["ERGO_DRAIN_SECONDS"]) >= Settings.model_fields["request_seconds"].default
    for engine in of_kind(resources, "StatefulSet", "-engine"):
        pod = engine["spec"]["template"]["spec"]
        sleep = float(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
        (timeout,) = [a.partition("=")[2] for a in pod["containers"][0]["args"] if a.startswith("--shutdown-timeout")]
        assert sleep + float(timeout) < pod["terminationGracePeriodSeconds"]


# --- What the gateway and vLLM are told -----------------------------------------------------------------------------------------


@every_set
def test_the_gateway_knows_every_variable(values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variable that the chart sets is one of Settings', and Settings takes all of them with the values of the chart."""
    given = environment(render(values))
    assert set(given) <= {f"ERGO_{name.upper()}" for name in Settings.model_fields}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.host, settings.port, settings.engine) == ("0.0.0.0", 8000, "vllm")
    for name, value in values.get("gateway", {}).get("settings", {}).items():
        told = getattr(settings, name)
        assert (list(told) if isinstance(told, tuple) else told) == value


def test_large_numbers_keep_their_digits() -> None:
    """A setting of more than seven digits reaches the gateway as an integer, not in helm's 1.34217728e+08."""
    given = environment(render(SETS["external"]))
    assert (given["ERGO_MAX_BODY_BYTES"], given["ERGO_MAX_BYTES_IN_FLIGHT"]) == ("134217728", "1073741824")


def test_no_secret_is_in_a_config_map() -> None:
    """No setting whose type is secret may be given as a value, nor a file in its place; each comes from a Secret, as a file."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    settable = schema["properties"]["gateway"]["properties"]["settings"]["properties"]
    secret = {name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)}
    assert secret == {"api_keys", "engine_api_key", "session_secret"}
    assert not (secret | {f"{name}_file" for name in secret}) & set(settable)
    for values in SETS.values():
        resources = render(values)
        given = environment(resources)
        assert not {f"ERGO_{name.upper()}" for name in secret} & set(given)
        pod = one(resources, "Deployment", "-gateway")["spec"]["template"]["spec"]
        secrets = {volume["name"]: volume["secret"]["items"] for volume in pod["volumes"] if "secret" in volume}
        held = {
            f"{mount['mountPath']}/{item['path']}"
            for mount in pod["containers"][0]["volumeMounts"]
            for item in secrets.get(mount["name"], ())
        }
        assert held == {value for name, value in given.items() if name.endswith("_FILE")}


def test_the_gateway_finds_its_engine() -> None:
    """The URLs are the engine's pods by name, the Service where pods come and go, the router, or the external ones; port and
    model's name are those of the engine."""
    for values, count in (({}, 1), (SETS["two-engines"], 2), ({"engine": {"replicas": 0}}, 1)):
        resources = render(values)
        given, engine = environment(resources), one(resources, "StatefulSet", "-engine")
        name, service = engine["metadata"]["name"], engine["spec"]["serviceName"]
        (port,) = one(resources, "Service", service)["spec"]["ports"]
        urls = [f"http://{name}-{number}.{service}:{port['port']}" for number in range(count)]
        assert given["ERGO_ENGINE_URL"].split(",") == urls
        assert f"--port={port['port']}" in arguments(resources)
        assert given["ERGO_ENGINE_MODEL"] == arguments(resources)[2] == flags(arguments(resources))["--served-model-name"]
    resources = render(SETS["keda"])
    assert environment(resources)["ERGO_ENGINE_URL"] == f"http://{one(resources, 'Service', '-engine')['metadata']['name']}:8001"
    assert environment(render(SETS["vllm-router"]))["ERGO_ENGINE_URL"] == "http://eyes-router:8080"
    given = environment(render(SETS["external"]))
    assert (given["ERGO_ENGINE_URL"], given["ERGO_ENGINE_MODEL"]) == (
        "https://vllm.models.example:8443,https://vllm-2.models.example:8443,http://spare.models.example",
        "ergo",
    )


def test_engines_get_a_cache_each_or_share_one() -> None:
    """A claim that all nodes can mount, or that is there already, is shared; else each pod has its own, as large as asked for."""
    for values, own, shared in (
        ({}, 1, 0),
        (SETS["two-engines"], 1, 0),
        (SETS["keda"], 0, 1),
        (SETS["air-gapped"], 0, 0),
    ):
        resources = render(values)
        templates = one(resources, "StatefulSet", "-engine")["spec"].get("volumeClaimTemplates", [])
        claims = of_kind(resources, "PersistentVolumeClaim")
        assert (len(templates), len(claims)) == (own, shared)
        for claim in templates + claims:
            assert claim["spec"]["resources"]["requests"]["storage"] == "40Gi"


def test_engines_are_replaced_one_by_one() -> None:
    """All engines start at once; an update takes one pod away before its successor comes, and an eviction one at a time."""
    resources = render(SETS["two-engines"])
    spec = one(resources, "StatefulSet", "-engine")["spec"]
    assert (spec["podManagementPolicy"], spec["updateStrategy"]) == ("Parallel", {"type": "RollingUpdate"})
    assert one(resources, "PodDisruptionBudget", "-engine")["spec"]["maxUnavailable"] == 1


def test_prometheus_scrapes_each_engine_once() -> None:
    """Of the two Services before the engines the monitor chooses one."""
    resources = render(SETS["two-engines"])
    chosen = one(resources, "ServiceMonitor", "-engine")["spec"]["selector"]["matchLabels"]
    (service,) = [s for s in of_kind(resources, "Service") if chosen.items() <= s["metadata"]["labels"].items()]
    assert service["metadata"]["name"].endswith("-engine")


def test_prompts_reach_the_gateway() -> None:
    """Prompts given as a text are in a ConfigMap to the byte, where ERGO_PROMPTS looks, and change the sum of the settings; a
    ConfigMap that is there already is mounted likewise."""
    text = (ROOT / "server/ergo_server/protocol/prompts/ergo.toml").read_text()
    sums = set()
    for values, name in (
        ({"gateway": {"prompts": {"content": text}}}, f"{RELEASE}-ergo-vqa-prompts"),
        ({"gateway": {"prompts": {"content": text + "# another"}}}, f"{RELEASE}-ergo-vqa-prompts"),
        (SETS["external"], "prompts"),
    ):
        resources = render(values)
        template = one(resources, "Deployment", "-gateway")["spec"]["template"]
        (volume,) = [volume for volume in template["spec"]["volumes"] if "configMap" in volume]
        (mount,) = [m for m in template["spec"]["containers"][0]["volumeMounts"] if m["name"] == volume["name"]]
        assert volume["configMap"]["name"] == name
        assert environment(resources)["ERGO_PROMPTS"] == f"{mount['mountPath']}/{volume['configMap']['items'][0]['path']}"
        sums.add(template["metadata"]["annotations"]["checksum/config"])
        for made in of_kind(resources, "ConfigMap", "-prompts"):
            assert made["data"] == {volume["configMap"]["items"][0]["key"]: values["gateway"]["prompts"]["content"]}
    assert len(sums) == 3


def test_a_change_of_settings_restarts_the_gateway() -> None:
    """Pods are annotated with a sum over the ConfigMap: another setting, another sum; nothing else changes it."""
    sums = [
        one(render(values), "Deployment", "-gateway")["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
        for values in ({}, {"gateway": {"replicas": 5}}, {"gateway": {"settings": {"max_queued": 5}}})
    ]
    assert sums[0] == sums[1] != sums[2]


DIFFERENT = {
    "--revision": "Compose names the folder into which a revision was fetched",
    "--tensor-parallel-size": "the chart gives it for more than one GPU",
    "--gpu-memory-utilization": "a value of .env; engine.extraArgs in the chart",
    "--max-num-queued-reqs": "one gateway there, two here",
    "--shutdown-timeout": "Docker's patience, and Kubernetes'",
}
"""Flags in which chart and Compose file differ, with the reason."""


def test_the_engine_is_that_of_compose() -> None:
    """The chart runs the image that the Compose file runs, with the same flags and values but for those with a reason."""
    ours, theirs = flags(arguments(render({}))), flags(engine_flags())
    differ = {flag for flag in ours.keys() | theirs.keys() if ours.get(flag) != theirs.get(flag)}
    assert differ == DIFFERENT.keys()
    assert container_of(render({}), "StatefulSet", "-engine")["image"] == composition(example())["services"]["engine"]["image"]


@pytest.mark.parametrize("name", ["defaults", "two-engines", "gpu-pool"])
def test_engines_take_what_gateways_ask(name: str) -> None:
    """Where both have a fixed number, all that gateways work on at a time fits into the engines."""
    resources = render(SETS[name])
    gateways = one(resources, "Deployment", "-gateway")["spec"]["replicas"]
    engines = one(resources, "StatefulSet", "-engine")["spec"]["replicas"]
    asked = gateways * Settings.model_fields["max_concurrent"].default
    assert int(flags(arguments(resources))["--max-num-queued-reqs"]) * engines >= asked


@pytest.mark.vllm
def test_vllm_knows_every_flag() -> None:
    """Every flag that the chart gives is one of the real vLLM's."""
    if reason := why_no_vllm():
        pytest.skip(reason)
    told = subprocess.run([VLLM, "serve", "--help=all"], capture_output=True, text=True, check=True, cwd="/").stdout
    for values in (SETS["defaults"], SETS["gpu-pool"]):
        given = flags(arguments(render(values)))
        assert len(given) > 12
        assert not [flag for flag in given if not re.search(rf"^\s+(--\S+(, | ))*?{flag}\b", told, re.MULTILINE)]


def test_gpus_are_asked_for_and_used() -> None:
    """The pod's limit is what the values say, beside its memory; the model is split over more than one."""
    engine = one(render(SETS["gpu-pool"]), "StatefulSet", "-engine")["spec"]["template"]["spec"]
    (container,) = engine["containers"]
    assert container["resources"]["limits"] == {"memory": "48Gi", "nvidia.com/gpu": 2}
    assert "--tensor-parallel-size=2" in container["args"]
    assert "--gpu-memory-utilization=0.85" in container["args"]
    assert (engine["nodeSelector"], engine["runtimeClassName"]) == ({"pool": "gpu"}, "nvidia")


def test_the_download_has_the_engines_environment() -> None:
    """What is added to the engine's environment, such as a mirror's address, the download has too."""
    variable = {"name": "HF_ENDPOINT", "value": "https://hub.example"}
    pod = one(render({"engine": {"extraEnv": [variable]}}), "StatefulSet", "-engine")["spec"]["template"]["spec"]
    for container in (*pod["initContainers"], *pod["containers"]):
        assert variable in container["env"]


@every_set
def test_probes_ask_what_there_is(values: Values) -> None:
    """The gateway is restarted by what tells of its process, and gets requests by what tells of its engine as well; the app knows
    both paths, and listens on the port. The engine's probes ask its /health."""
    resources = render(values)
    container = container_of(resources, "Deployment", "-gateway")
    assert [container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")] == [
        {"path": path, "port": "http"} for path in ("/healthz", "/healthz", "/readyz")
    ]
    with asking.client() as http:
        assert {http.get(path).status_code for path in ("/healthz", "/readyz")} == {200}
    assert container["ports"] == [{"name": "http", "containerPort": int(environment(resources)["ERGO_PORT"])}]
    if of_kind(resources, "StatefulSet"):
        container = container_of(resources, "StatefulSet", "-engine")
        probes = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")]
        assert probes == [{"path": "/health", "port": "http"}] * 3
        assert container["ports"] == [{"name": "http", "containerPort": int(flags(arguments(resources))["--port"])}]


@every_set
def test_gateways_are_spread(values: Values) -> None:
    """The constraints count the gateway's own pods, over zones and nodes."""
    template = one(render(values), "Deployment", "-gateway")["spec"]["template"]
    constraints = template["spec"]["topologySpreadConstraints"]
    assert [found["topologyKey"] for found in constraints] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    for found in constraints:
        assert found["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_a_first_rollout_may_wait_for_the_download() -> None:
    """A rollout of gateways, which are ready when the engine is, fails no sooner than the patience that the page gives helm."""
    (minutes,) = re.findall(r"--timeout (\d+)m", (ROOT / "docs/kubernetes.md").read_text())
    assert one(render({}), "Deployment", "-gateway")["spec"]["progressDeadlineSeconds"] > int(minutes) * 60


def test_ways_in_lead_to_the_gateway() -> None:
    """Ingress and HTTPRoute name the gateway's Service and a port that it has, the one by its name, the other by its number."""
    resources = render(charts.over(SETS["external"], {"gateway": {"service": {"port": 8080}}}))
    service = one(resources, "Service", "-gateway")
    (port,) = service["spec"]["ports"]
    (rule,) = one(resources, "Ingress")["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"] == {
        "service": {"name": service["metadata"]["name"], "port": {"name": port["name"]}}
    }
    (rule,) = one(resources, "HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": service["metadata"]["name"], "port": port["port"]}]
    assert port["port"] == 8080
    assert port["targetPort"] in [found["name"] for found in container_of(resources, "Deployment", "-gateway")["ports"]]


# --- Walls ----------------------------------------------------------------------------------------------------------------------


@every_set
def test_no_container_may_more_than_it_must(values: Values) -> None:
    """Every container runs as a user without rights, on a read-only root, with bounded memory and no token of the cluster."""
    found = 0
    for _, pod in pods(render(values)):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            found += 1
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
    assert found >= 2


def policy(resources: list[Resource], name: str) -> Any:
    """Return the specification of a network policy."""
    return one(resources, "NetworkPolicy", name)["spec"]


@every_set
def test_every_pod_that_serves_has_a_policy(values: Values) -> None:
    """Each workload's pods are chosen by one policy, which limits both directions."""
    resources = render(values)
    chosen = [spec["podSelector"]["matchLabels"] for spec in (p["spec"] for p in of_kind(resources, "NetworkPolicy"))]
    for workload in of_kind(resources, "Deployment") + of_kind(resources, "StatefulSet"):
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert len([labels_ for labels_ in chosen if labels_.items() <= labels.items()]) == 1
    for found in of_kind(resources, "NetworkPolicy"):
        assert found["spec"]["policyTypes"] == ["Ingress", "Egress"]


def test_the_engine_has_no_way_out() -> None:
    """Without the download the engine may reach nothing, with it public addresses only; gateways and Prometheus reach it."""
    closed = policy(render(SETS["air-gapped"]), "-engine")
    assert closed["egress"] == []
    (rule,) = closed["ingress"]
    sources = [peer.get("podSelector", peer.get("namespaceSelector"))["matchLabels"] for peer in rule["from"]]
    assert [list(labels.values())[-1] for labels in sources] == ["gateway", "monitoring"]
    _, out = policy(render(SETS["defaults"]), "-engine")["egress"]
    assert {"10.0.0.0/8", "169.254.0.0/16"} <= set(out["to"][0]["ipBlock"]["except"])
    assert out["ports"] == [{"protocol": "TCP", "port": 443}]


def test_the_gateway_reaches_what_it_needs() -> None:
    """Its way out is DNS and the engines, at the ports of their URLs; the internet only where remote images are on."""
    _, engine = policy(render(SETS["defaults"]), "-gateway")["egress"]
    assert engine["to"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "engine"
    _, engine, images = policy(render(SETS["external"]), "-gateway")["egress"]
    assert engine["to"] == [{"ipBlock": {"cidr": "203.0.113.7/32"}}]
    assert engine["ports"] == [{"protocol": "TCP", "port": 8443}, {"protocol": "TCP", "port": 80}]
    assert images["to"][0]["ipBlock"]["cidr"] == "0.0.0.0/0"
    for url, port in (("http://router", 80), ("https://router/base", 443)):
        _, engine = policy(render({"engine": {"enabled": False, "external": {"urls": [url]}}}), "-gateway")["egress"]
        assert (engine["ports"][0]["port"], engine["to"][0]["ipBlock"]["except"]) == (port, ["169.254.0.0/16"])


def test_names_are_asked_for_where_the_cluster_answers() -> None:
    """DNS is allowed to kube-system and to NodeLocal DNSCache's address, at the ports that values name."""
    to = [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}},
        {"ipBlock": {"cidr": "169.254.20.10/32"}},
    ]
    for values, ports in (({}, [53]), ({"networkPolicy": {"dnsPorts": [53, 5353]}}, [53, 5353])):
        for name in ("-gateway", "-engine"):
            dns = policy(render(values), name)["egress"][0]
            assert dns["to"] == to
            assert dns["ports"] == [{"protocol": protocol, "port": port} for port in ports for protocol in ("UDP", "TCP")]


def test_a_mirror_within_can_be_reached_for_the_download() -> None:
    """What values add to the engine's way out is there while it downloads, and gone with the download."""
    rule = {"to": [{"ipBlock": {"cidr": "10.0.0.7/32"}}], "ports": [{"protocol": "TCP", "port": 3128}]}
    values = {"networkPolicy": {"engineEgress": [rule]}}
    assert policy(render(values), "-engine")["egress"][-1] == rule
    assert policy(render(charts.over(values, {"engine": {"model": {"download": False}}})), "-engine")["egress"] == []


def test_without_a_way_out_every_image_is_from_within() -> None:
    """With a registry of one's own, every image is by digest from there, and nothing is downloaded."""
    for _, pod in pods(render(SETS["air-gapped"])):
        assert "initContainers" not in pod
        for container in pod["containers"]:
            assert re.fullmatch(r"registry\.internal:5000/[a-z/-]+@sha256:[0-9a-f]{64}", container["image"])


def test_a_pinned_image_is_never_the_latest() -> None:
    """By default each image has the tag of a version, the gateway's that of this source."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    images = {container["image"] for _, pod in pods(render({})) for container in pod["containers"]}
    assert {image.partition(":")[0]: image.partition(":")[2] for image in images} == {
        "ergo-vqa-gateway": __version__,
        "vllm/vllm-openai": "v0.32.0",
    }


def test_the_page_pushes_what_the_chart_pulls() -> None:
    """The image that the page builds and pushes is, by name and tag, the one that its install command makes the chart pull."""
    page = (ROOT / "docs/kubernetes.md").read_text()
    (repository,) = re.findall(r"--set gateway\.image\.repository=(\S+)", page)
    image = container_of(render({"gateway": {"image": {"repository": repository}}}), "Deployment", "-gateway")["image"]
    assert re.findall(r"^docker (?:build .* -t|push) (\S+)", page, re.MULTILINE) == [image, image]


# --- What watches, and what scales ----------------------------------------------------------------------------------------------


def test_dashboards_are_those_of_the_repository() -> None:
    """Each ConfigMap holds one dashboard, to the byte, and none is left out."""
    found: dict[str, str] = {}
    for resource in of_kind(render(SETS["keda"]), "ConfigMap"):
        if "grafana_dashboard" in resource["metadata"]["labels"]:
            assert resource["metadata"]["annotations"] == {"grafana_folder": "ergo-vqa"}
            found |= resource["data"]
    assert found == {path.name: path.read_text() for path in queries.DASHBOARDS}


def test_rules_are_those_of_the_repository() -> None:
    """The PrometheusRules have the groups of observability's files, but for the runbook's address, which one can open."""
    rendered = [group for rule in of_kind(render(SETS["keda"]), "PrometheusRule") for group in rule["spec"]["groups"]]
    source = [group for path in sorted(queries.RULES) for group in yaml.safe_load(path.read_text())["groups"]]
    base = "https://git.example/ergo-vqa/blob/main/"
    urls = 0
    for group in source:
        for rule in group["rules"]:
            if "runbook_url" in rule.get("annotations", {}):
                rule["annotations"]["runbook_url"] = base + rule["annotations"]["runbook_url"]
                urls += 1
    assert rendered == source
    assert urls > 10


def test_the_chart_reads_the_only_copy() -> None:
    """What the chart has of observability are links to it, which helm follows when it packs a chart."""
    for name, source in (("dashboards", "grafana/dashboards"), ("rules", "prometheus/rules")):
        link = CHART / "files" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / "observability" / source


def test_alerts_know_the_gateway_by_its_job() -> None:
    """The monitors name the jobs that rules and prometheus.yml name, however the release is called."""
    monitors = of_kind(render(charts.over(SETS["keda"], {"nameOverride": "eyes"})), "ServiceMonitor")
    jobs = {
        relabeling["replacement"]
        for monitor in monitors
        for relabeling in monitor["spec"]["endpoints"][0]["relabelings"]
        if relabeling["targetLabel"] == "job"
    }
    scraped = yaml.safe_load((ROOT / "observability/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert jobs == {config["job_name"] for config in scraped}
    assert 'job="ergo-vqa"' in (ROOT / "observability/prometheus/rules/alerts.yml").read_text()
    for monitor in monitors:
        chosen = monitor["spec"]["selector"]["matchLabels"]
        (service,) = [
            s
            for s in of_kind(render(charts.over(SETS["keda"], {"nameOverride": "eyes"})), "Service")
            if chosen.items() <= s["metadata"]["labels"].items()
        ]
        assert monitor["spec"]["endpoints"][0]["port"] in [port["name"] for port in service["spec"]["ports"]]


def test_gateways_scale_by_the_cpu_that_they_ask_for() -> None:
    """The HorizontalPodAutoscaler is about the gateway's Deployment, by CPU in percent of a request that its pods make."""
    resources = render(SETS["external"])
    spec = one(resources, "HorizontalPodAutoscaler")["spec"]
    deployment = one(resources, "Deployment", "-gateway")
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment["metadata"]["name"]}
    target = {"type": "Utilization", "averageUtilization": 65}
    assert spec["metrics"] == [{"type": "Resource", "resource": {"name": "cpu", "target": target}}]
    assert "cpu" in container_of(resources, "Deployment", "-gateway")["resources"]["requests"]


def test_an_engine_always_stays() -> None:
    """Nothing scales engines to none, where no gateway would be ready, and no question would come that calls one back."""
    spec = one(render(SETS["keda"]), "ScaledObject", "-engine")["spec"]
    assert min(spec["minReplicaCount"], spec["fallback"]["replicas"]) >= 1
    assert "idleReplicaCount" not in spec


def triggers() -> list[tuple[str, str]]:
    """Return (name of the ScaledObject, query) of every trigger."""
    return [
        (scaled["metadata"]["name"], trigger["metadata"]["query"])
        for scaled in of_kind(render(SETS["keda"]), "ScaledObject")
        for trigger in scaled["spec"]["triggers"]
    ]


def test_scalers_ask_for_what_the_gateway_tells() -> None:
    """Every metric of a scaler is one of the gateway's, or of vLLM's, and a gauge; promtool parses the query."""
    exposition = asking.client().get("/metrics").text
    gauges = set(re.findall(r"^# TYPE (\S+) gauge$", exposition, re.MULTILINE))
    named = [selector for _, query in triggers() for selector in queries.selectors(query)]
    ours = {selector.metric for selector in named if selector.metric.startswith("ergo_")}
    assert ours == {"ergo_requests_queued", "ergo_requests_in_flight"} & gauges
    assert {selector.metric for selector in named} - ours == {"vllm:num_requests_waiting"}


@pytest.mark.vllm
def test_scalers_ask_for_what_vllm_tells(vllm: str) -> None:
    """The metric by which engines are scaled is on /metrics of the real vLLM."""
    text = httpx2.get(f"{vllm}/metrics", trust_env=False, timeout=60).text
    assert "# TYPE vllm:num_requests_waiting gauge" in text


def test_promtool_reads_the_queries_of_scalers(tmp_path: Path) -> None:
    """promtool parses the query of each trigger."""
    rules = [{"record": f"query:{number}", "expr": query} for number, (_, query) in enumerate(triggers())]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    assert f"{len(rules)} rules found" in queries.promtool("check", "rules", path)
    assert len(rules) == 3


def test_scalers_see_their_own_release_only() -> None:
    """Every selector names the namespace and the Service, by the labels that the operator gives to what it scrapes."""
    resources = render(SETS["keda"])
    services = {service["metadata"]["name"] for service in of_kind(resources, "Service")}
    for _, query in triggers():
        for selector in queries.selectors(query):
            asked = {label: value for label, _, value in selector.matchers}
            assert asked["namespace"] == NAMESPACE
            assert asked["service"] in services
            assert ("engine" in asked["service"]) == selector.metric.startswith("vllm:")


# --- `helm test` ----------------------------------------------------------------------------------------------------------------


def program(values: Values) -> tuple[str, str, dict[str, Any]]:
    """Return program, URL and container of the test's pod."""
    (container,) = one(render(values), "Pod")["spec"]["containers"]
    assert container["command"] == ["python", "-c"]
    source, url = container["args"]
    return source, url, container


def test_the_tests_pod_may_ask() -> None:
    """The pod asks the gateway's Service, is let in by its policy, and shows a key where one is needed."""
    resources = render({})
    source, url, container = program({})
    service = one(resources, "Service", "-gateway")
    assert url == f"http://{RELEASE}-ergo-vqa-gateway:80"
    assert service["metadata"]["name"] in url
    labels = one(resources, "Pod")["metadata"]["labels"]
    peers = itertools.chain(*(rule["from"] for rule in policy(resources, "-gateway")["ingress"]))
    assert any(peer["podSelector"]["matchLabels"].items() <= labels.items() for peer in peers if "podSelector" in peer)
    assert source.strip() == (CHART / "files" / "ask.py").read_text().strip()
    assert "env" not in container
    _, _, container = program(SETS["external"])
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "tester", "key": "api-key"}


def test_the_tests_pod_stays_for_its_log() -> None:
    """The pod is deleted before the next one is made, not when it has succeeded: `helm test --logs` reads its log after that."""
    annotations = one(render({}), "Pod")["metadata"]["annotations"]
    assert annotations == {"helm.sh/hook": "test", "helm.sh/hook-delete-policy": "before-hook-creation"}


def ask(source: str, url: str) -> subprocess.CompletedProcess[str]:
    """Do what the pod does."""
    return subprocess.run([sys.executable, "-W", "error", "-c", source, url], capture_output=True, text=True, check=False)


def test_the_tests_pod_is_content_with_what_works(real: str) -> None:
    """The pod's program, as rendered, asks a real server and finds a box, tokens, and reuse."""
    done = ask(program({})[0], real)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"reused [1-9]", done.stdout)


def test_the_tests_pod_finds_what_does_not_work() -> None:
    """A gateway whose engine reuses nothing, counts nothing and writes no box fails the test, each by its name."""
    with support.gateway(asking.scripted(zoom="no idea")) as url:
        done = ask(program({})[0], url)
    assert done.returncode == 1
    for fault in ("no box", "prefix cache"):
        assert fault in done.stderr
