"""MAE's forward pass in NumPy float64, written from the paper and the published shapes, as a judge that
shares no code with the project: it embeds all patches, decodes in image order, predicts all patches."""

import math

import numpy as np

erf = np.vectorize(math.erf)


def layer_norm(x, state, name):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def block(x, state, name, heads):
    N, T, D = x.shape
    qkv = linear(layer_norm(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv").reshape(N, T, 3, heads, D // heads)
    q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(D // heads)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    attention = scores / scores.sum(-1, keepdims=True)
    x = x + linear((attention @ v).transpose(0, 2, 1, 3).reshape(N, T, D), state, f"{name}.attn.proj")
    y = linear(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
    return x + linear(0.5 * y * (1 + erf(y / math.sqrt(2))), state, f"{name}.mlp.fc2")


def blocks(x, state, name, depth, heads, norm):
    for i in range(depth):
        x = block(x, state, f"{name}.{i}", heads)
    return layer_norm(x, state, norm)


def patches(imgs, p):
    """[N, 3, H, W] -> [N, L, 3, p, p], row-major."""
    H, W = imgs.shape[2:]
    corners = [(r, c) for r in range(0, H, p) for c in range(0, W, p)]
    return np.stack([imgs[:, :, r : r + p, c : c + p] for r, c in corners], axis=1)


def mae_loss(imgs, noise, state, *, p, depth, heads, decoder_depth, decoder_heads, keep, norm_pix):
    """-> (loss, pred [N, L, p*p*3], mask [N, L])."""
    N, L = noise.shape
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    tokens = np.tensordot(patches(imgs, p), weight, axes=([2, 3, 4], [1, 2, 3])) + bias + state["pos_embed"][:, 1:]
    ids_shuffle = np.argsort(noise, axis=1)
    ids_restore = np.argsort(ids_shuffle, axis=1)
    rows = np.arange(N)[:, None]
    cls = np.broadcast_to(state["cls_token"] + state["pos_embed"][:, :1], (N, 1, tokens.shape[2]))
    x = np.concatenate([cls, tokens[rows, ids_shuffle[:, :keep]]], axis=1)
    y = linear(blocks(x, state, "blocks", depth, heads, "norm"), state, "decoder_embed")

    mask_tokens = np.broadcast_to(state["mask_token"], (N, L - keep, y.shape[2]))
    restored = np.concatenate([y[:, 1:], mask_tokens], axis=1)[rows, ids_restore]
    y = np.concatenate([y[:, :1], restored], axis=1) + state["decoder_pos_embed"]
    y = blocks(y, state, "decoder_blocks", decoder_depth, decoder_heads, "decoder_norm")
    pred = linear(y, state, "decoder_pred")[:, 1:]

    target = patches(imgs, p).transpose(0, 1, 3, 4, 2).reshape(N, L, -1)
    if norm_pix:
        var = target.var(-1, ddof=1, keepdims=True)
        target = (target - target.mean(-1, keepdims=True)) / np.sqrt(var + 1e-6)
    mask = (ids_restore >= keep).astype(float)
    loss = (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    return loss, pred, mask
