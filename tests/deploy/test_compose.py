"""docker/compose.yaml and .env.example: what a person gets who copies the one and starts the other."""

from __future__ import annotations

import json
import re
import tomllib
from importlib.resources import files
from itertools import chain
from typing import Any

import pytest
import yaml
from composition import FILE, FOLDER, composition, engine_flags, example, variables
from jsonschema import Draft202012Validator
from support import ROOT

from ergo_server.settings import Settings

SERVICES: dict[str, dict[str, Any]] = composition(example())["services"]
GATEWAYS = ["gateway", "gateway-gpu2", "gateway-cpu"]
ENGINES = ["engine", "engine-2"]
PROFILES = ["gpu", "gpu2", "cpu"]
OBSERVABILITY = ROOT / "observability"


def seconds(text: str) -> int:
    """Return a duration of the Compose file."""
    number, unit = int(text[:-1]), text[-1]
    return number * {"s": 1, "m": 60}[unit]


def active(profile: str) -> dict[str, dict[str, Any]]:
    """Return the services that run in a profile."""
    return {name: service for name, service in SERVICES.items() if profile in service.get("profiles", [profile])}


@pytest.mark.parametrize("given", [{"COMPOSE_PROFILES": "gpu"}, example()], ids=["defaults", ".env.example"])
def test_it_is_a_compose_file(given: dict[str, str]) -> None:
    """The file satisfies the Compose specification's own schema, with its defaults and as .env.example fills it."""
    # check-jsonschema carries the specification's schema.
    schema = json.loads(files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text())
    assert [error.message for error in Draft202012Validator(schema).iter_errors(composition(given))] == []


def test_a_missing_env_file_is_said_at_once() -> None:
    """Without .env Compose refuses to start anything, rather than Prometheus and Grafana alone."""
    with pytest.raises(KeyError, match="COMPOSE_PROFILES"):
        composition({})


def test_every_variable_is_in_the_example() -> None:
    """.env.example names every variable that the Compose file reads, each under a comment and with the default of the file."""
    defaults = {name: rest - {None} for name, rest in variables().items()}
    assert example().keys() == defaults.keys()
    for name, value in example().items():
        assert defaults[name] in (set(), {value}), name
    for paragraph in (FOLDER / ".env.example").read_text().split("\n\n"):
        assert paragraph.startswith("#")


@pytest.mark.parametrize("name", GATEWAYS)
def test_the_gateways_settings_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ERGO_ variable that the Compose file or the image sets is a setting, and takes the value it is given."""
    image = dict(re.findall(r"(ERGO_\w+)=(\S+)", (FOLDER / "gateway.Dockerfile").read_text().split("\nENV ")[1]))
    assert image.keys() == {"ERGO_HOST", "ERGO_PORT"}
    given = image | SERVICES[name]["environment"]
    for variable, value in given.items():
        assert variable.removeprefix("ERGO_").lower() in Settings.model_fields, variable
        monkeypatch.setenv(variable, value)
    settings = Settings()
    assert settings.engine == ("embedded" if name == "gateway-cpu" else "vllm")
    assert f":{settings.port}" in SERVICES[name]["ports"][0][-5:]


@pytest.mark.parametrize("name", GATEWAYS)
def test_stopping_waits_for_what_is_under_way(name: str) -> None:
    """Docker waits for longer than a gateway drains, and for longer than the engine does."""
    given = SERVICES[name]["environment"]
    drain = float(given["ERGO_DRAIN_SECONDS"]) + float(given.get("ERGO_DRAIN_GRACE_SECONDS", 0))
    assert seconds(SERVICES[name]["stop_grace_period"]) > drain + 3
    (timeout,) = (int(flag.split("=")[1]) for flag in engine_flags() if flag.startswith("--shutdown-timeout="))
    for engine in ENGINES:
        assert seconds(SERVICES[engine]["stop_grace_period"]) > timeout >= drain + 3


@pytest.mark.parametrize("name", GATEWAYS)
def test_a_gateway_may_do_little(name: str) -> None:
    """A gateway has a read-only root, no capability, no way to gain one, and bounds on its processes and memory; nobody makes it
    root again."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
    assert service["pids_limit"] > 0
    assert service["mem_limit"]
    assert not {"user", "privileged", "cap_add", "network_mode", "volumes"} & service.keys()


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_has_a_capability(name: str) -> None:
    """Each service has lost every capability and gains none."""
    assert SERVICES[name]["cap_drop"] == ["ALL"]
    assert SERVICES[name]["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add"} & SERVICES[name].keys()


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_has_no_way_out(name: str) -> None:
    """An engine is on one network, which is internal, publishes no port, loads nothing from the hub, and writes nothing to the
    model's volume; the service that fetches the model is not on that network."""
    networks = composition(example())["networks"]
    engine = SERVICES[name]
    assert list(engine["networks"]) == ["engine"]
    assert networks["engine"] == {"internal": True}
    assert "ports" not in engine
    assert engine["environment"]["HF_HUB_OFFLINE"] == "1"
    assert "models:/models:ro" in engine["volumes"]
    assert SERVICES["model"]["networks"] == ["edge"]
    assert engine["depends_on"] == {"model": {"condition": "service_completed_successfully"}}


def test_the_engine_serves_what_was_fetched() -> None:
    """The engines' model is the folder into which the model's pinned revision is put; another model or revision has another."""
    folders = set()
    for model, revision in (("nota-ai/ERGO-7B", "abc"), ("nota-ai/ERGO-7B", "def"), ("someone/else", "abc")):
        service = composition(example() | {"MODEL": model, "MODEL_REVISION": revision})["services"]
        folder = service["engine"]["command"][0]
        assert service["model"]["command"] == [model, f"--revision={revision}", f"--local-dir={folder}"]
        assert service["engine-2"]["command"] == service["engine"]["command"]
        assert f"--served-model-name={model}" in service["engine"]["command"]
        folders.add(folder)
    assert len(folders) == 3
    (kept,) = {volume.split(":")[1] for volume in SERVICES["model"]["volumes"]}
    assert all(folder.startswith(f"{kept}/") for folder in folders)


def test_the_page_tells_which_revision_was_fetched() -> None:
    """The command that the page gives reads below the folder into which the model is put by default, in a service that has it."""
    (command,) = re.findall(r"^docker compose run .*$", (ROOT / "docs/docker.md").read_text(), re.MULTILINE)
    path = command.split()[-1]
    assert path.startswith(f"{SERVICES['engine']['command'][0]}/.cache/huggingface/download/")
    assert " model " in command


def test_two_engines_differ_in_their_gpu_only() -> None:
    """The second engine does what the first does, on another GPU, with cores and a cache of its own; the gateway of gpu2 differs
    from that of gpu in knowing both."""
    first, second = SERVICES["engine"], SERVICES["engine-2"]
    assert {key for key in first if first[key] != second[key]} == {"profiles", "volumes", "deploy"}
    ((one,), (other,)) = (s["deploy"]["resources"]["reservations"]["devices"] for s in (first, second))
    # Docker counts from GPU 0.
    assert (one["count"], other["device_ids"]) == (1, ["1"])
    assert not {volume for volume in first["volumes"] if "/root/" in volume} & set(second["volumes"])
    moved = composition(example() | {"ENGINE_2_GPU": "3", "ENGINE_2_CPUS": "8-15"})["services"]["engine-2"]
    assert moved["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] == ["3"]
    assert moved["cpuset"] == "8-15"
    alone, both = SERVICES["gateway"], SERVICES["gateway-gpu2"]
    assert {key for key in alone if alone[key] != both[key]} == {"profiles", "networks", "environment", "depends_on"}
    assert both["environment"]["ERGO_ENGINE_URL"].split(",") == [f"http://{name}:8001" for name in ENGINES]
    assert alone["environment"] | {"ERGO_ENGINE_URL": ""} == both["environment"] | {"ERGO_ENGINE_URL": ""}


def test_the_engine_takes_what_the_gateway_sends() -> None:
    """The engine's queue holds what the gateway works on, and a prompt the images that the gateway lets through, and the crop."""
    flags = dict(flag.split("=", 1) for flag in engine_flags() if "=" in flag)
    assert int(flags["--max-num-queued-reqs"]) >= Settings().max_concurrent
    assert json.loads(flags["--limit-mm-per-prompt"]) == {"image": Settings().max_images + 1, "video": 0}


def test_ports_are_published_on_loopback() -> None:
    """Nothing is reachable from another machine until someone says so."""
    published = list(chain.from_iterable(service.get("ports", []) for service in SERVICES.values()))
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published), published


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_is_whole(profile: str) -> None:
    """What runs in a profile depends on nothing that does not, and no two of it publish the same port; each profile has a
    gateway, Prometheus and Grafana."""
    services = active(profile)
    assert {"prometheus", "grafana"} < services.keys()
    assert len(services.keys() & set(GATEWAYS)) == 1
    assert set(chain.from_iterable(service.get("depends_on", ()) for service in services.values())) <= services.keys()
    ports = list(chain.from_iterable(service.get("ports", []) for service in services.values()))
    assert len(set(ports)) == len(ports)


def test_secrets_are_files() -> None:
    """No service gets a password, key or token as the value of a variable: only the name of a file that Compose mounts."""
    secrets = composition(example())["secrets"]
    assert all(secret["file"].startswith("secrets/") for secret in secrets.values())
    for service in SERVICES.values():
        assert set(service.get("secrets", ())) <= secrets.keys()
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|KEY|TOKEN", name):
                assert value in [f"/run/secrets/{secret}" for secret in service["secrets"]], name


def test_what_is_mounted_from_the_repository_is_there() -> None:
    """Every file and folder that the Compose file takes from the repository exists, and is mounted where it is looked for."""
    mounted = {}
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            source, target, *_ = volume.split(":")
            if source.startswith("."):
                assert (FOLDER / source).exists(), source
                mounted[target] = (FOLDER / source).resolve()
    assert (FOLDER / SERVICES["gateway"]["build"]["context"] / SERVICES["gateway"]["build"]["dockerfile"]).is_file()
    (provider,) = yaml.safe_load((OBSERVABILITY / "grafana/provisioning/dashboards/ergo-vqa.yaml").read_text())["providers"]
    assert mounted[provider["options"]["path"]] == OBSERVABILITY / "grafana/dashboards"
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (mounted[provider["options"]["path"]] / home.rpartition("/")[2]).is_file()


@pytest.mark.parametrize("profile", PROFILES)
def test_prometheus_finds_what_it_scrapes(profile: str) -> None:
    """The names in Prometheus' configuration are those of services that run, on a network that Prometheus shares with them; each
    engine that runs is found."""
    names: dict[str, list[str]] = {}
    for name, service in active(profile).items():
        if set(service["networks"]) & set(SERVICES["prometheus"]["networks"]):
            for alias in [name, *_aliases(service["networks"])]:
                names.setdefault(alias, []).append(name)
    gateway, vllm = yaml.safe_load((OBSERVABILITY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert gateway["static_configs"] == [{"targets": ["gateway:8000"]}]
    assert len(names["gateway"]) == 1
    (found,) = vllm["dns_sd_configs"]
    assert (found["type"], found["port"]) == ("A", 8001)
    (alias,) = found["names"]
    assert names.get(alias, []) == {"gpu": ["engine"], "gpu2": ENGINES, "cpu": []}[profile]


def _aliases(networks: list[str] | dict[str, dict[str, list[str]] | None]) -> list[str]:
    if isinstance(networks, list):
        return []
    return [alias for settings in networks.values() for alias in (settings or {}).get("aliases", [])]


def test_images_are_named_with_their_version() -> None:
    """The gateway's images bear the version of the project, and no image of anybody is `latest`."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name in GATEWAYS:
        assert SERVICES[name]["image"].endswith(f":{version}")
    assert all(re.search(r":v?\d", service["image"]) for service in SERVICES.values())
    assert ":latest" not in FILE.read_text()
