"""The manifests of examples/kubernetes: their fields exist, and what their operators make of them.

The folder `kubeflow` has the part of the operators' published schemas that the manifests use.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from commands import ROOT

from megatron_vl.launch.cluster import ClusterEnv, cluster_env

KINDS = ("pytorchjob", "trainjob")
SCHEMAS = Path(__file__).with_name("kubeflow")


def manifest(kind: str) -> dict:
    return yaml.safe_load((ROOT / "examples" / "kubernetes" / f"{kind}.yaml").read_text())


def faults(kind: str, job: dict) -> list[str]:
    schema = json.loads((SCHEMAS / f"{kind}.json").read_text())
    return [one.message for one in jsonschema.Draft202012Validator(schema).iter_errors(job)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_fits_its_operators_schema(kind):
    assert faults(kind, manifest(kind)) == []


def places(node, path=()) -> list[tuple]:
    """Of every mapping in a manifest, how to come to it."""
    inner = node.items() if isinstance(node, dict) else enumerate(
        node if isinstance(node, list) else ())
    own = [path] if isinstance(node, dict) else []
    return own + [found for key, one in inner for found in places(one, (*path, key))]


def changed(job: dict, path: tuple, change) -> dict:
    job = node = copy.deepcopy(job)
    for key in path:
        node = node[key]
    change(node)
    return job


# Their keys are a user's.
FREE = ("annotations", "labels", "limits")


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_does_not_exist_is_found_wherever_it_is(kind):
    job = json.loads(json.dumps(manifest(kind)))  # without YAML's anchors
    where = [path for path in places(job) if not path or path[-1] not in FREE]
    assert len(where) >= 5
    for path in where:
        assert len(faults(kind, changed(job, path, lambda node: node.update(replica=1)))) == 1, path


@pytest.mark.parametrize(("kind", "path", "values"), [
    ("pytorchjob", ("spec",), {"nprocPerNode": 8}),
    ("pytorchjob", ("spec", "runPolicy"), {"cleanPodPolicy": ["Running"]}),
    ("pytorchjob", ("spec", "pytorchReplicaSpecs", "Worker"), {"replicas": "1"}),
    ("pytorchjob", (), {"apiVersion": "kubeflow.org/v2"}),
    ("trainjob", ("spec", "trainer"), {"numProcPerNode": "8"}),
    ("trainjob", ("spec", "runtimeRef"), {"name": ""}),
    ("trainjob", (), {"kind": "PyTorchJob"}),
])
def test_a_value_of_another_type_is_found(kind, path, values):
    assert len(faults(kind, changed(manifest(kind), path, lambda node: node.update(values)))) == 1


def pytorchjob_variables(job: dict, node: int) -> dict[str, str]:
    """What the Training Operator sets in a pod of `job`.

    pkg/controller.v1/pytorch/{envvar,master}.go of github.com/kubeflow/trainer, v1.9.4.
    """
    spec, replicas = job["spec"], job["spec"]["pytorchReplicaSpecs"]
    nodes, processes = sum(one["replicas"] for one in replicas.values()), spec["nprocPerNode"]
    (container,) = replicas["Master"]["template"]["spec"]["containers"]
    (port,) = (one for one in container["ports"] if one["name"] == "pytorchjob-port")
    address, port = "job-master-0", str(port["containerPort"])
    return {
        "PYTHONUNBUFFERED": "1", "MASTER_PORT": port, "PET_MASTER_PORT": port,
        "MASTER_ADDR": address, "PET_MASTER_ADDR": address,
        "WORLD_SIZE": str(nodes * int(processes)), "RANK": str(node), "PET_NODE_RANK": str(node),
        "PET_NPROC_PER_NODE": processes, "PET_NNODES": str(nodes),
    }


def trainjob_variables(job: dict, node: int) -> dict[str, str]:
    """What Kubeflow Trainer sets in a pod of `job`.

    pkg/runtime/framework/plugins/torch/torch.go of github.com/kubeflow/trainer, v2.3.0.
    """
    trainer = job["spec"]["trainer"]
    return {
        "PET_NNODES": str(trainer["numNodes"]),
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]), "PET_NODE_RANK": str(node),
        "PET_MASTER_ADDR": "job-node-0-0.job", "PET_MASTER_PORT": "29500",
    }


@pytest.mark.parametrize(("kind", "variables", "address", "port", "source"), [
    ("pytorchjob", pytorchjob_variables, "job-master-0", 23456, "PyTorchJob"),
    ("trainjob", trainjob_variables, "job-node-0-0.job", 29500, "TrainJob"),
])
@pytest.mark.parametrize("node", [0, 1])
def test_the_operators_variables_tell_every_pod_its_place(kind, variables, address, port, source,
                                                          node):
    assert cluster_env(variables(manifest(kind), node)) == ClusterEnv(
        nnodes=2, node_rank=node, nproc_per_node=8, master_addr=address, master_port=port,
        source=source,
    )


def test_the_manifests_hold_what_no_schema_asks_for():
    """Names that the operators look for, and numbers that have to be the same."""
    pytorch, train = map(manifest, KINDS)
    replicas = pytorch["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master", "Worker"] and "elasticPolicy" not in pytorch["spec"]
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(
            pytorch["spec"]["nprocPerNode"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]}
        assert pod["terminationGracePeriodSeconds"] >= 300, "the run saves in it"
    trainer = train["spec"]["trainer"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
