"""As scripts for DeepSpeed look: its tutorial's shape, and the calls that public training scripts make. Only the import
of deepspeed differs. Run by tests/numerics/test_deepspeed_script.py."""

import argparse
import json

import torch
from torch import nn

import runtime as deepspeed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.out = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = deepspeed.checkpointing.checkpoint(lambda y, layer=layer: layer(y).relu() + y, x)
        return self.out(x)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--save", required=True)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args()

    torch.manual_seed(0)
    deepspeed.init_distributed(dist_backend="gloo")
    with deepspeed.zero.Init(config_dict_or_path=args.deepspeed_config, enabled=True):
        net = Net()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 24, generator=generator)
    labels = inputs[:, :10].argmax(dim=1)
    parameters = filter(lambda p: p.requires_grad, net.parameters())
    model_engine, _, trainloader, _ = deepspeed.initialize(
        args=args, model=net, model_parameters=parameters, training_data=torch.utils.data.TensorDataset(inputs, labels)
    )
    device = model_engine.local_rank if torch.cuda.is_available() else "cpu"
    criterion = nn.CrossEntropyLoss()
    losses = []
    for epoch in range(args.epochs):
        model_engine.train()
        for _, (x, y) in enumerate(trainloader):
            x, y = x.to(device), y.to(device)
            if model_engine.fp16_enabled():
                x = x.half()
            loss = criterion(model_engine(x), y)
            model_engine.backward(loss)
            model_engine.step()
            if model_engine.is_gradient_accumulation_boundary():
                losses.append(loss.item())
        model_engine.eval()
        with torch.no_grad():
            model_engine(inputs[:4].to(device))
        model_engine.save_checkpoint(args.save, tag=f"epoch{epoch}", client_state={"epoch": epoch})
    _, client_state = model_engine.load_checkpoint(args.save)
    with deepspeed.zero.GatheredParameters(list(net.parameters()), modifier_rank=0):
        total = sum(p.double().sum().item() for p in net.parameters())
    model_engine.save_16bit_model(args.save, "whole.bin")
    if model_engine.global_rank == 0:
        print(json.dumps({
            "losses": losses, "client_state": client_state, "total": total, "lr": model_engine.get_lr(),
            "steps": model_engine.global_steps, "norm": model_engine.get_global_grad_norm(),
            "micro": model_engine.train_micro_batch_size_per_gpu(), "zero": model_engine.zero_optimization_stage(),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
