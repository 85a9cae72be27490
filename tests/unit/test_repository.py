import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
MAKEFILE = (ROOT / "Makefile").read_text()


def recipe(target: str) -> list[str]:
    """Return the commands of a word that people type, with the programs of .venv."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    assert found is not None, target
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in found[1].splitlines()]


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_hooks_run_what_make_lint_runs() -> None:
    """A commit that passed its hooks passes the checks of CI: the same programs, of the same versions."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]

    entries = [hook["entry"].replace(" --force-exclude", "") for hook in repository["hooks"]]

    assert repository["repo"] == "local"
    assert entries == recipe("lint")


def test_continuous_integration_runs_what_people_run() -> None:
    """There is no second list of checks: CI types `make test`."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())

    assert [step["run"] for step in steps(workflow) if "run" in step] == [".ci/run"]
    assert "exec make test" in (ROOT / ".ci/run").read_text()


def test_continuous_integration_has_the_oldest_python() -> None:
    """The version that the distribution asks for is tested."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (version,) = (
        step["with"]["python-version"] for step in steps(workflow) if "setup-python" in step.get("uses", "")
    )

    assert project["requires-python"] == f">={version}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_only_read(path: Path) -> None:
    """Code of a pull request gets no right to change anything, and no step is without an end."""
    workflow = yaml.safe_load(path.read_text())

    assert workflow["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
    assert all(("run" in step) != ("uses" in step) for step in steps(workflow))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_ask_for_something(path: Path) -> None:
    """GitHub shows a form only if it has a name, a description and questions with labels of their own."""
    form = yaml.safe_load(path.read_text())
    labels = [part["attributes"]["label"] for part in form["body"]]

    assert form["name"]
    assert form["description"]
    assert len(set(labels)) == len(labels) > 1
    assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_updates_are_asked_for_in_places_that_exist() -> None:
    """Dependabot looks where the versions are."""
    updates = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text())["updates"]
    files = {
        "pip": "constraints.txt",
        "docker": "Dockerfile",
        "docker-compose": "compose.yaml",
        "github-actions": ".github/workflows/ci.yml",
    }

    assert {update["package-ecosystem"] for update in updates} == files.keys()
    assert [name for name in files.values() if not (ROOT / name).exists()] == []
