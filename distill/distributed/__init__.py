"""The ranks of a run: launcher, rendezvous, process groups, meshes."""
