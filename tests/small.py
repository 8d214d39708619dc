"""A model and a length that cost no time, for tests of everything around the training."""

from common.device import has_bf16

# 3,850 parameters on 4 tokens: 9 steps an epoch take 0.1 s.
SMALL = ["--model.patch_size", "4", "--model.width", "16", "--model.depth", "1", "--model.heads", "2",
         "--model.optim.warmup_epochs", "1", "--trainer.max_epochs", "2"]  # fmt: skip

# Of a model of any size.
TWO_STEPS = [
    "--data.batch_size", "2", "--data.eval_batch_size", "2", "--data.workers", "0", "--trainer.max_epochs", "1",
    "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.check_val_every_n_epoch", "1",
    "--model.optim.warmup_epochs", "0",
    *([] if has_bf16() else ["--trainer.precision", "32-true"]),  # an imitated bf16 makes minutes of seconds
]  # fmt: skip
