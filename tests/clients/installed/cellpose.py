"""Cellpose: its network made of SAM's encoder, the readout fitted to discs, then cells, flows and a step of training."""

import numpy as np
import torch

PACKAGE, IMAGE_SIZE = "cellpose", 1024
SIDE = 256


def discs(seed, count=14):
    """A picture of bright discs on dark ground, float32 [256, 256, 3], and their labels."""
    random, y, x = np.random.default_rng(seed), *np.mgrid[:SIDE, :SIDE]
    image, labels = random.normal(0.1, 0.02, (SIDE, SIDE)), np.zeros((SIDE, SIDE), np.int32)
    for number in range(1, count + 1):
        (cy, cx), r = random.uniform(20, SIDE - 20, 2), random.uniform(12, 20)
        inside = ((y - cy) ** 2 + (x - cx) ** 2 < r**2) & (labels == 0)
        labels[inside] = number
        image[inside] = random.uniform(0.6, 1.0) + random.normal(0, 0.02, inside.sum())
    return np.repeat(image[..., None], 3, 2).astype(np.float32), labels


def fit_readout(net, pictures):
    """The last layer by least squares, on what the encoder sees in the pictures."""
    from cellpose import dynamics

    inputs, targets, seen = [], [], []
    net.out.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    for image, labels in pictures:
        flows = dynamics.labels_to_flows([labels], device=torch.device("cpu"))[0]  # labels, cells, down, across
        target = torch.tensor(np.stack([5 * flows[2], 5 * flows[3], 8 * flows[1] - 4]))
        with torch.no_grad():
            net(torch.tensor(image.transpose(2, 0, 1))[None])
        inputs.append(seen.pop()[0].flatten(1).T)
        patches = target.unfold(1, 8, 8).unfold(2, 8, 8)  # [3, 32, 32, 8, 8]
        targets.append(patches.permute(1, 2, 0, 3, 4).reshape(32 * 32, 192))
    net.out._forward_pre_hooks.clear()
    a, b = torch.cat(inputs).double(), torch.cat(targets).double()
    a = torch.cat([a, torch.ones(len(a), 1)], 1)
    weights = torch.linalg.solve(a.T @ a + 1e-2 * torch.eye(a.shape[1]), a.T @ b).float()
    net.out.weight.data, net.out.bias.data = weights[:-1].T[..., None, None].contiguous(), weights[-1].contiguous()


def run(photo, checkpoint, folder):
    from cellpose import models, train, vit

    net = vit.CPSAM()
    state = torch.load(checkpoint, weights_only=True)
    fresh = vit.sam_model_registry["vit_l"](None).image_encoder
    fresh.load_state_dict({k[14:]: v for k, v in state.items() if k.startswith("image_encoder.")})
    w, positions = fresh.patch_embed.proj.weight.data, fresh.pos_embed.data
    changed = fresh.state_dict() | {
        "patch_embed.proj.weight": 4 * w[:, :, ::2, ::2],
        "pos_embed": positions[:, ::2, ::2],
    }
    net.encoder.load_state_dict(changed)
    net.eval()
    fit_readout(net, [discs(seed) for seed in range(1, 7)])
    net.save_model(str(folder / "cpsam"))

    model = models.CellposeModel(gpu=False, pretrained_model=str(folder / "cpsam"), use_bfloat16=False)
    image, labels = discs(0)
    cells, flows, _ = model.eval(image, batch_size=1, flow_threshold=0.0)
    losses = train.train_seg(
        model.net,
        [image, *(discs(seed)[0] for seed in (7, 8))],
        [labels, *(discs(seed)[1] for seed in (7, 8))],
        n_epochs=1,
        batch_size=1,
        learning_rate=1e-5,
        save_path=str(folder),
        min_train_masks=1,
        bsize=SIDE,
    )[1]
    masks = np.stack([cells == number for number in range(1, cells.max() + 1)]) if cells.max() else cells[None] > 0
    drawn = (255 * image.clip(0, 1)).astype(np.uint8)
    return {"image": drawn, "flows": flows[1], "cells": flows[2], "losses": np.asarray(losses), "masks": masks}
