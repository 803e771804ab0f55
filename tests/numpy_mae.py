"""MAE's forward pass in NumPy float64, written from the paper and the published shapes, as a judge that
shares no code with the project: it embeds all patches, decodes in image order, predicts all patches."""

import math

import numpy as np

erf = np.vectorize(math.erf)


def layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * weight + bias


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def block(x, state, name, heads):
    N, T, D = x.shape
    y = layer_norm(x, state[f"{name}.norm1.weight"], state[f"{name}.norm1.bias"])
    qkv = linear(y, state, f"{name}.attn.qkv").reshape(N, T, 3, heads, D // heads)
    q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(D // heads)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    attention = scores / scores.sum(-1, keepdims=True)
    y = (attention @ v).transpose(0, 2, 1, 3).reshape(N, T, D)
    x = x + linear(y, state, f"{name}.attn.proj")
    y = layer_norm(x, state[f"{name}.norm2.weight"], state[f"{name}.norm2.bias"])
    y = linear(y, state, f"{name}.mlp.fc1")
    y = 0.5 * y * (1 + erf(y / math.sqrt(2)))
    return x + linear(y, state, f"{name}.mlp.fc2")


def embed(imgs, state, p):
    """[N, 3, H, W] -> all patch tokens, [N, L, D], row-major, plus their positions."""
    N, _, H, W = imgs.shape
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    tokens = [
        np.tensordot(imgs[:, :, r : r + p, c : c + p], weight, axes=([1, 2, 3], [1, 2, 3])) + bias
        for r in range(0, H, p)
        for c in range(0, W, p)
    ]
    return np.stack(tokens, axis=1) + state["pos_embed"][:, 1:]


def encoder(tokens, state, depth, heads):
    cls = np.broadcast_to(state["cls_token"] + state["pos_embed"][:, :1], (len(tokens), 1, tokens.shape[2]))
    x = np.concatenate([cls, tokens], axis=1)
    for i in range(depth):
        x = block(x, state, f"blocks.{i}", heads)
    return layer_norm(x, state["norm.weight"], state["norm.bias"])


def mae_loss(imgs, noise, state, *, p, depth, heads, decoder_depth, decoder_heads, keep, norm_pix):
    """-> (loss, pred [N, L, p*p*3], mask [N, L])."""
    N, L = noise.shape
    tokens = embed(imgs, state, p)
    ids_shuffle = np.argsort(noise, axis=1)
    ids_restore = np.argsort(ids_shuffle, axis=1)
    rows = np.arange(N)[:, None]
    latent = encoder(tokens[rows, ids_shuffle[:, :keep]], state, depth, heads)

    y = linear(latent, state, "decoder_embed")
    mask_tokens = np.broadcast_to(state["mask_token"], (N, L - keep, y.shape[2]))
    patches = np.concatenate([y[:, 1:], mask_tokens], axis=1)[rows, ids_restore]
    y = np.concatenate([y[:, :1], patches], axis=1) + state["decoder_pos_embed"]
    for i in range(decoder_depth):
        y = block(y, state, f"decoder_blocks.{i}", decoder_heads)
    y = layer_norm(y, state["decoder_norm.weight"], state["decoder_norm.bias"])
    pred = linear(y, state, "decoder_pred")[:, 1:]

    _, _, H, W = imgs.shape
    target = np.stack(
        [
            imgs[:, :, r : r + p, c : c + p].transpose(0, 2, 3, 1).reshape(N, -1)
            for r in range(0, H, p)
            for c in range(0, W, p)
        ],
        axis=1,
    )
    if norm_pix:
        var = target.var(-1, ddof=1, keepdims=True)
        target = (target - target.mean(-1, keepdims=True)) / np.sqrt(var + 1e-6)
    mask = (ids_restore >= keep).astype(float)
    loss = (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    return loss, pred, mask
