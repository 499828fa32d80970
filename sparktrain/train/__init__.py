"""The torch floor: one rank's view of a run. The only importer of torch, transformers and safetensors."""
