"""`penstock render`: the cluster file as manifests for Kubernetes."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import click

from cluster.base.env import read_environment
from cluster.base.errors import ConfigError
from cluster.base.load import load_cluster_file
from cluster.base.quantities import Size
from cluster.cli.console import console, print_warning
from cluster.control.kuberay.options import ModelsVolume, RenderOptions
from cluster.control.kuberay.pod_plan import plan_for_pods
from cluster.control.kuberay.render import render as render_files
from cluster.planner.hub import Hub

_MEMORY = Size(1 << 30, 16 << 40)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(["kuberay"]), default="kuberay", show_default=True)
@click.option("--output", "-o", default="-", show_default=True, help="Directory, or - to print.")
@click.option("--image", help="Image of the pods.  [default: penstock:VERSION]")
@click.option(
    "--models",
    default="pvc",
    show_default=True,
    help="Volume with a directory per checkpoint: pvc, pvc:CLAIM, hostPath:/DIR or image:REF.",
)
@click.option("--models-dir", default="/models", show_default=True, help="Where pods mount it.")
@click.option("--pod-cpus", type=click.IntRange(1, 1024), default=4, show_default=True)
@click.option("--pod-memory", default="16GiB", show_default=True, help="Most memory of a pod.")
@click.option("--pod-gpus", type=click.IntRange(0, 64), default=0, show_default=True)
@click.option("--gpu-memory", default="80GiB", show_default=True, help="Memory of each GPU.")
@click.option("--gpu-resource", default="nvidia.com/gpu", show_default=True)
@click.option(
    "--max-replicas",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    help="Replicas of a model that can be had without a new Ray cluster.",
)
def render(file: Path, target: str, output: str, image: str | None, **pod: str) -> None:
    """Write FILE as a KubeRay RayService and what stands around it.

    The plan is made for pods of the size given here, so checkpoints have to be readable; what pods
    ask for is what the plan says.
    """
    hub = Hub(offline=read_environment().hub_offline)
    options = _options(image or f"penstock:{metadata.version('penstock')}", pod)
    plan = plan_for_pods(load_cluster_file(file), options, hub)
    for warning in plan.warnings:
        print_warning(warning)
    files = render_files(plan, options)
    if output == "-":
        click.echo(
            "---\n".join(text for name, text in files.items() if name != "kustomization.yaml")
        )
        return
    _write(Path(output), files)
    console.print(f"{output}: {', '.join(files)}", markup=False, soft_wrap=True)


def _options(image: str, pod: dict[str, str]) -> RenderOptions:
    return RenderOptions(
        image=image,
        models=ModelsVolume.parse(pod["models"]),
        models_dir=pod["models_dir"],
        cpus=int(pod["pod_cpus"]),
        memory_bytes=_bytes("--pod-memory", pod["pod_memory"]),
        gpus=int(pod["pod_gpus"]),
        gpu_memory_bytes=_bytes("--gpu-memory", pod["gpu_memory"]),
        gpu_resource=pod["gpu_resource"],
        max_replicas=int(pod["max_replicas"]),
    )


def _bytes(flag: str, text: str) -> int:
    try:
        return int(_MEMORY.parse(text))
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}.", param=flag) from None


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}.", param="-o") from error
