"""Starting a run on several devices: torchrun's arguments, and manifests for Slurm and Kubernetes."""
