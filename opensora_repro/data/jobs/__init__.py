"""How the tools run work: in processes of this machine or over a cluster, recorded, and never twice."""
