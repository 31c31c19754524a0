"""What scripts/train.sbatch needs to know before it starts a run, as lines that a shell reads."""

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

from distill.config import Config, parse_args
from distill.distributed import slurm
from distill.errors import UserError

_ADDRESS_OF_INTERFACE = 0x8915
"""SIOCGIFADDR of Linux."""


def main(argv: Sequence[str]) -> int:
    """Print the job's variables for the run that ``argv`` describes; returns 2 where recipe and job don't match."""
    try:
        found = variables(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"{name}={shlex.quote(value)}")
    return 0


def variables(argv: Sequence[str]) -> dict[str, str]:
    """NODES, RANKS of a node, ADDRESS and PORT of the rendezvous, RUN_DIR; made on the job's first node.

    The run folder is the same after a requeue. Raises UserError for a recipe that can't be read or doesn't match the
    allocation.
    """
    if asked := {"--help", "-h", "--dry-run", "--dry_run"} & set(argv):
        raise UserError(f"{min(asked)} needs no job: use python -m distill.train {min(asked)}")
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


def check_allocation(config: Config) -> None:
    """Raise UserError where ``cluster.*`` isn't what Slurm gave to the job; GPUs count where Slurm counts them."""
    (nodes, gpus), cluster = slurm.allocation(), config.cluster
    if cluster.num_nodes != nodes:
        raise UserError(
            f"cluster.num_nodes={cluster.num_nodes} but the job has {nodes} nodes: submit it by sbatch"
            f" -N{cluster.num_nodes}, or set cluster.num_nodes={nodes}"
        )
    if gpus is not None and config.runtime.device != "cpu" and cluster.gpus_per_node != gpus:
        raise UserError(
            f"cluster.gpus_per_node={cluster.gpus_per_node} but the job has {gpus} GPUs on a node: submit it by sbatch"
            f" --gpus-per-node={cluster.gpus_per_node}, or set cluster.gpus_per_node={gpus}"
        )


def free_port(job: int) -> int:
    """The first of the job's ports that nobody on this machine listens at."""
    for port in (slurm.port(job, place) for place in range(slurm.PORTS_OF_JOB)):
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    return slurm.port(job)  # what is wrong with it shall be said by who listens there


def address() -> str:
    """Where the other nodes find this one: on the interface GLOO_SOCKET_IFNAME, where that is set."""
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        return interface_address(interface)
    found = slurm.address_of(node := slurm.first_host(slurm.job_nodes()))
    if not slurm.resolves(found):
        raise UserError(
            f"the job's first node {node} has no address that can be resolved: set GLOO_SOCKET_IFNAME to the network"
            " interface on which the nodes reach each other"
        )
    return found


def interface_address(name: str) -> str:
    """The IPv4 address of this machine's network interface ``name``; raises UserError where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe, _ADDRESS_OF_INTERFACE, struct.pack("256s", name.encode()[:15]))
        except OSError as error:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise UserError(
                f"GLOO_SOCKET_IFNAME={name} has no address on {socket.gethostname()} ({error.strerror}): set it to one"
                f" of {known}, or unset it"
            ) from error
    return socket.inet_ntoa(found[20:24])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
