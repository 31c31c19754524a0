"""Print a Slurm job's nodes, rendezvous address and run directory as shell assignments.

The batch script scripts/train.sbatch evaluates them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.config import Config, parse_args, print_flag
from distill.distributed import slurm
from distill.distributed.hardware import check_gpus
from distill.errors import UserError, any_of, show

_SIOCGIFADDR = 0x8915
"""Linux's ioctl request for the IPv4 address of a network interface."""


def main(argv: Sequence[str]) -> int:
    """Print the dict ``variables(argv)`` as shell assignments; return 0, or exit code 2 for a UserError.

    ``argv``: command-line arguments of ``distill.train``.
    """
    try:
        found = variables(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"{name}={shlex.quote(value)}")
    return 0


def variables(argv: Sequence[str]) -> dict[str, str]:
    """Return the shell variables for scripts/train.sbatch, as a dict from name to value.

    The names are NODES, RANKS (ranks per node), ADDRESS and PORT of the rendezvous, and RUN_DIR. RUN_DIR is the same
    after a requeue. ``argv``: command-line arguments of ``distill.train``. Call it on the first node of the Slurm job.
    Raises UserError if the arguments are invalid, if the configured numbers of nodes and GPUs differ from the job's, or
    if the environment contains COMMAND, which no part of the job runs.
    """
    _refuse_command(os.environ.get("COMMAND", ""))
    if flag := print_flag(argv):
        raise UserError(
            f"{flag} cannot be used in a Slurm job", f"run python -m distill.train {flag} without sbatch", key=flag
        )
    config = parse_args(argv).config
    check_allocation(config)
    job, nodes = slurm.job_id(), config.cluster.num_nodes
    run_dir = config.runtime.run_dir or Path(config.logger.log_dir) / f"job_{job}"
    return {
        "NODES": str(nodes),
        "RANKS": str(config.cluster.gpus_per_node),
        "ADDRESS": address(),
        "PORT": str(free_port(job)),
        "RUN_DIR": str(run_dir),
    }


def _refuse_command(command: str) -> None:
    """Raise UserError if the environment variable COMMAND is set, as in ``sbatch --export=ALL,COMMAND=...``.

    NeMo-RL's batch script runs this command; train.sbatch would ignore it. The fix contains the recipe and the
    overrides of ``command`` if they can be read.
    """
    if not command:
        return
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    at = words.index("--config") if "--config" in words[:-1] else len(words)
    recipe = f"recipes/{Path(words[at + 1]).name}" if at < len(words) else "recipes/NAME.yaml"
    arguments = shlex.join(["--config", recipe, *words[at + 2 :]])
    raise UserError(
        f"environment variable COMMAND={show(command)} has no effect, because the job runs the arguments of"
        " scripts/train.sbatch",
        f"submit sbatch -N... scripts/train.sbatch {arguments}, without COMMAND in the environment",
        key="COMMAND",
        value=command,
    )


def check_allocation(config: Config) -> None:
    """Raise UserError if ``cluster.*`` and the Slurm job differ in nodes or GPUs, or if torch cannot use the GPUs.

    The GPUs are not compared if Slurm does not manage GPUs or if runtime.device is cpu.
    """
    (nodes, gpus), cluster = slurm.allocation(), config.cluster
    if cluster.num_nodes != nodes:
        raise UserError(
            f"cluster.num_nodes={cluster.num_nodes} but the job has {nodes} nodes",
            f"submit the job with sbatch -N{cluster.num_nodes}, or set cluster.num_nodes={nodes}",
            key="cluster.num_nodes",
            value=cluster.num_nodes,
        )
    if gpus is not None and config.runtime.device != "cpu" and cluster.gpus_per_node != gpus:
        raise UserError(
            f"cluster.gpus_per_node={cluster.gpus_per_node} but the job has {gpus} GPUs on a node",
            f"submit the job with sbatch --gpus-per-node={cluster.gpus_per_node}, or set cluster.gpus_per_node={gpus}",
            key="cluster.gpus_per_node",
            value=cluster.gpus_per_node,
        )
    check_gpus(config.runtime.device)


def free_port(job: int) -> int:
    """Return a rendezvous port that is free on this machine, derived from the Slurm job ID ``job``.

    Each job ID has PORTS_PER_JOB candidate ports. If all candidates are in use, return the first one.
    """
    for port in (slurm.port(job, index) for index in range(slurm.PORTS_PER_JOB)):
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    return slurm.port(job)  # rank 0 or torchrun will report why it cannot listen there


def address() -> str:
    """Return the address at which other nodes reach this node, the first node of the Slurm job.

    If GLOO_SOCKET_IFNAME names a network interface, return the address of this interface. Raises UserError if no
    address is found.
    """
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        return interface_address(interface)
    found = slurm.address_of(node := slurm.first_host(slurm.job_nodes()))
    if not slurm.resolves(found):
        raise UserError(
            f"the job's first node {node} has no address that can be resolved",
            "set GLOO_SOCKET_IFNAME to the network interface on which the nodes reach each other",
            key="GLOO_SOCKET_IFNAME",
            value=node,
        )
    return found


def interface_address(name: str) -> str:
    """Return the IPv4 address of the network interface ``name``; raise UserError if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError as error:
            interfaces = any_of(interface for _, interface in socket.if_nameindex())
            raise UserError(
                f"GLOO_SOCKET_IFNAME={name} has no address on {socket.gethostname()} ({error.strerror})",
                f"set it to {interfaces}, or unset it",
                key="GLOO_SOCKET_IFNAME",
                value=name,
            ) from error
    return socket.inet_ntoa(found[20:24])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
