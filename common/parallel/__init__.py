"""How one training step is spread over several devices.

Strategies of Lightning's Trainer, chosen with `--trainer.strategy NAME`:

- `ddp`, the default for many devices: each has the whole model and its part of the global batch.
- `fsdp2`, for large models: as `ddp`, but each device holds only its shard of parameters, gradients and moments.
- `sequence`, for images of very many tokens: devices share images and divide their tokens.
"""
