"""A RayJob of KubeRay 1.5.1 or newer (`ray.io/v1`): a Ray cluster for one run, which is gone when the run has ended."""

from __future__ import annotations

import math
import re
import shlex
from typing import Any

import yaml

from launcher.cluster.ray_yaml import in_comment
from launcher.driver.secrets import OF_THE_USER
from launcher.errors import ClusterError
from launcher.recipe.load import LoadedRecipe
from launcher.units import parse_seconds

RUNS = "/runs"
"""Where the shared volume is in every pod; also the folder in which the job's RECIPE is looked up."""
SECRETS = "slipway"
"""The Kubernetes Secret with the user's tokens; a key that it does not have is left out."""
CPUS_PER_GPU, GIB_PER_GPU = 8, 64
MARGIN_S = 20
"""After `checkpoint.grace`: for Ray and the launcher to end."""

_HEADER = """\
# A run as a RayJob of KubeRay 1.5.1 or newer, as `slipway cluster render --for kuberay` writes it for Ray {ray}.
#
#   kubectl create secret generic {secrets} --from-literal=HF_TOKEN=...     once; what the run may need
#   kubectl apply -f {file}
#   kubectl logs -f -l job-name={name}
#
# The volume claim {claim} is one that all pods may write (ReadWriteMany). The run's folder is on it, and the
# recipe and its data unless they are packaged. KubeRay makes a token for the cluster. A failed try is repeated with a
# new cluster and goes on from the newest checkpoint.
"""


def ray_job(
    loaded: LoadedRecipe,
    recipe: str,
    name: str,
    image: str,
    workers: int,
    gpus: int,
    claim: str,
    file: str = "rayjob.yaml",
) -> str:
    """The manifest as text, for `workers` pods with `gpus` GPUs each; `recipe` as it is named in the pods.

    Raises:
        ClusterError: `name` makes no name of Kubernetes.
    """
    import ray

    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    if not name[:1].isalpha():
        raise ClusterError(f"{name!r} is no name of a RayJob", hint="give the recipe a name that begins with a letter")
    grace_s = math.ceil(parse_seconds(loaded.recipe.checkpoint.grace)) + MARGIN_S
    run = ["python", "-m", "launcher.job", "--resume", "auto", "--run-dir", f"{RUNS}/{name}", "--", recipe]

    def pod(container: str, resources: dict[str, Any]) -> dict[str, Any]:
        return {
            "spec": {
                "terminationGracePeriodSeconds": grace_s,
                "containers": [
                    {
                        "name": container,
                        "image": image,
                        "workingDir": RUNS,
                        "env": [
                            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
                            *(
                                {
                                    "name": key,
                                    "valueFrom": {"secretKeyRef": {"name": SECRETS, "key": key, "optional": True}},
                                }
                                for key in OF_THE_USER
                            ),
                        ],
                        "resources": {"limits": resources, "requests": resources},
                        "volumeMounts": [{"name": "runs", "mountPath": RUNS}],
                    }
                ],
                "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}],
            }
        }

    each = max(gpus, 1)
    size = {"cpu": str(CPUS_PER_GPU * each), "memory": f"{GIB_PER_GPU * each}Gi"}
    values = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": shlex.join(run),
            "submissionMode": "K8sJobMode",
            "backoffLimit": 3,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 60,
            "rayClusterSpec": {
                "rayVersion": ray.__version__,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    # No worker of the run is placed here. The submitter reaches the dashboard through its service.
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": pod("ray-head", {"cpu": "4", "memory": "16Gi"}),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": workers,
                        "minReplicas": workers,
                        "maxReplicas": workers,
                        "rayStartParams": {},
                        "template": pod("ray-worker", size | ({"nvidia.com/gpu": str(gpus)} if gpus else {})),
                    }
                ],
            },
        },
    }
    header = _HEADER.format(
        ray=ray.__version__, secrets=SECRETS, file=in_comment(file), name=name, claim=in_comment(claim)
    )
    return header + yaml.dump(values, Dumper=_NoAliases, sort_keys=False, width=1000)


class _NoAliases(yaml.SafeDumper):
    """Writes a value that is there twice twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
