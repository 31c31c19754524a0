"""Start and connect the ranks of a run: launcher, rendezvous, process groups, device meshes."""
