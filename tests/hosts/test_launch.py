"""docs/launch: what can be known of its files without the machines that they are for."""

import re
import shlex
import subprocess

import yaml


def test_the_files_of_the_page_are_there_and_can_be_read(repo):
    folder = repo / "docs" / "launch"
    page = (repo / "docs" / "launch.md").read_text()
    assert {path.name for path in folder.iterdir()} == set(re.findall(r"\]\(launch/([\w.-]+)\)", page))
    subprocess.run(["bash", "-n", folder / "slurm.sbatch"], check=True)
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)

    (jobset,) = yaml.safe_load_all((folder / "gke-multislice.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    service, job = yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert environment["JAX_NUM_PROCESSES"] == str(job["spec"]["completions"])
    assert environment["JAX_COORDINATOR_ADDRESS"].startswith(
        f"{job['metadata']['name']}-0.{service['metadata']['name']}:"
    )
    rules = job["spec"]["podFailurePolicy"]["rules"]
    codes = {code: rule["action"] for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]}
    assert codes == {75: "Ignore", 1: "FailJob", 65: "FailJob"}


def test_what_images_are_made_of_is_in_the_repository(repo):
    for path in (repo / "docs" / "launch").glob("*.Dockerfile"):
        for line in path.read_text().splitlines():
            if line.startswith("COPY"):
                assert all((repo / name).exists() for name in shlex.split(line)[1:-1]), line
