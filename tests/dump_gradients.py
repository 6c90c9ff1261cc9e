"""Not a test: `train_gpt2.py` with an optimizer that writes the gradients it is given to the file in
$GRADIENTS."""

import os

import torch

import train_gpt2
from fineweb import run_command

configure_optimizer = train_gpt2.configure_optimizer


def dumping_optimizer(model, config):
    optimizer = configure_optimizer(model, config)

    def dump(*_):
        torch.save(
            {name: parameter.grad for name, parameter in model.named_parameters()},
            os.environ["GRADIENTS"] + os.environ.get("RANK", "0"),
        )

    optimizer.register_step_pre_hook(dump)
    return optimizer


train_gpt2.configure_optimizer = dumping_optimizer

if __name__ == "__main__":
    run_command(train_gpt2.main, train_gpt2.TrainConfig)
