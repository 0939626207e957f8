"""The vision networks against hand-written PyTorch ones with the same weights, in float64 on both sides.

The PyTorch modules carry the names of ours, so that one function maps their weights and their gradients alike.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.models import (
    CNN,
    MLP,
    BasicBlock,
    BottleneckBlock,
    ConvNeXt,
    PreActBasicBlock,
    PreActBottleneckBlock,
    ResNet,
    make_norm,
)
from jaxdl.paths import flatten

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional

RATE, N_STEPS, BATCH = 0.05, 4, 5
LABELS = np.array([0, 2, 1, 0, 1])


@pytest.fixture(autouse=True)
def float64():
    threads, default = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(default)


def make_norm_2d(kind, n):
    return nn.BatchNorm2d(n) if kind == "batch" else nn.GroupNorm(2, n)


class TorchMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense_0, self.dense_1, self.head = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = F.gelu(self.dense_0(x.permute(0, 2, 3, 1).flatten(1)))
        return self.head(x + F.gelu(self.dense_1(x)))


class TorchStage(nn.Module):
    def __init__(self, n_in, n_out, norm):
        super().__init__()
        self.conv_0, self.norm_0 = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), make_norm_2d(norm, n_out)
        self.conv_1, self.norm_1 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False), make_norm_2d(norm, n_out)

    def forward(self, x):
        x = F.relu(self.norm_0(F.max_pool2d(self.conv_0(x), 2)))
        return F.relu(self.norm_1(self.conv_1(x)))


class TorchCNN(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.stage_0, self.stage_1 = TorchStage(3, 4, norm), TorchStage(4, 6, norm)
        self.dense, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.stage_1(self.stage_0(x)).mean((2, 3))
        return self.head(F.relu(self.dense(x)))


class TorchBlock(nn.Module):
    """A residual block as torchvision writes it (version 1.5), or with pre-activation."""

    def __init__(self, n_in, features, stride, norm, is_bottleneck, is_preactivation):
        super().__init__()
        n_out = features * (4 if is_bottleneck else 1)
        sizes = [(n_in, features, 1), (features, features, 3), (features, n_out, 1)]
        sizes = sizes if is_bottleneck else [(n_in, features, 3), (features, n_out, 3)]
        self.n, self.is_preactivation = len(sizes), is_preactivation
        for i, (a, b, size) in enumerate(sizes):
            step = stride if i == int(is_bottleneck) else 1
            setattr(self, f"conv_{i}", nn.Conv2d(a, b, size, step, size // 2, bias=False))
            setattr(self, f"norm_{i}", make_norm_2d(norm, a if is_preactivation else b))
        if stride != 1 or n_in != n_out:
            self.shortcut_conv = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
            if not is_preactivation:
                self.shortcut_norm = make_norm_2d(norm, n_out)

    def forward(self, x):
        return self.before(x) if self.is_preactivation else self.after(x)

    def after(self, x):
        y = x
        for i in range(self.n):
            y = getattr(self, f"norm_{i}")(getattr(self, f"conv_{i}")(y))
            y = F.relu(y) if i < self.n - 1 else y
        return F.relu(y + (self.shortcut_norm(self.shortcut_conv(x)) if hasattr(self, "shortcut_conv") else x))

    def before(self, x):
        y = first = F.relu(self.norm_0(x))
        for i in range(self.n):
            y = getattr(self, f"conv_{i}")(F.relu(getattr(self, f"norm_{i}")(y)) if i > 0 else y)
        return y + (self.shortcut_conv(first) if hasattr(self, "shortcut_conv") else x)


class TorchResNet(nn.Module):
    """Stages of 2 and 1 blocks, 4 and 8 features."""

    def __init__(self, norm, is_bottleneck, is_preactivation, stem):
        super().__init__()
        self.stem, wide = stem, 4 if is_bottleneck else 1
        block = lambda *sizes: TorchBlock(*sizes, norm, is_bottleneck, is_preactivation)  # noqa: E731
        self.stem_conv = (
            nn.Conv2d(3, 4, 7, 2, 3, bias=False) if stem == "imagenet" else nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        )
        if not is_preactivation:
            self.stem_norm = make_norm_2d(norm, 4)
        self.stage_0 = nn.ModuleDict({"block_0": block(4, 4, 1), "block_1": block(4 * wide, 4, 1)})
        self.stage_1 = nn.ModuleDict({"block_0": block(4 * wide, 8, 2)})
        if is_preactivation:
            self.final_norm = make_norm_2d(norm, 8 * wide)
        self.head = nn.Linear(8 * wide, 3)

    def forward(self, x):
        x = self.stem_conv(x)
        x = F.relu(self.stem_norm(x)) if hasattr(self, "stem_norm") else x
        x = F.max_pool2d(x, 3, 2, 1) if self.stem == "imagenet" else x
        for block in (*self.stage_0.values(), *self.stage_1.values()):
            x = block(x)
        x = F.relu(self.final_norm(x)) if hasattr(self, "final_norm") else x
        return self.head(x.mean((2, 3)))


class ChannelNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class TorchConvNeXtBlock(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(n, n, 7, padding=3, groups=n), nn.LayerNorm(n, 1e-6)
        self.expand, self.project = nn.Linear(n, 4 * n), nn.Linear(4 * n, n)
        self.layer_scale = nn.Parameter(torch.ones(n))

    def forward(self, x):
        y = self.norm(self.depthwise(x).movedim(1, -1))
        return x + (self.layer_scale * self.project(F.gelu(self.expand(y)))).movedim(-1, 1)


class TorchConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem_conv, self.stem_norm = nn.Conv2d(3, 4, 2, 2), ChannelNorm(4, 1e-6)
        self.stage_0 = nn.ModuleDict({"block_0": TorchConvNeXtBlock(4)})
        parts = {"downsample_norm": ChannelNorm(4, 1e-6), "downsample_conv": nn.Conv2d(4, 6, 2, 2)}
        self.stage_1 = nn.ModuleDict({**parts, "block_0": TorchConvNeXtBlock(6)})
        self.final_norm, self.head = nn.LayerNorm(6, 1e-6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stage_0["block_0"](self.stem_norm(self.stem_conv(x)))
        for part in self.stage_1.values():
            x = part(x)
        return self.head(self.final_norm(x.mean((2, 3))))


def to_flax(named):
    """A PyTorch state dict, or its gradients, as `(params, batch_stats)` under our paths."""
    collections = {"params": {}, "batch_stats": {}}
    for name, tensor in named.items():
        *path, kind = name.split(".")
        if kind == "num_batches_tracked":
            continue
        value = tensor.detach().numpy().copy()
        names = {"weight": "scale" if value.ndim == 1 else "kernel", "running_mean": "mean", "running_var": "var"}
        node = collections["batch_stats" if kind.startswith("running") else "params"]
        for key in path:
            node = node.setdefault(key, {})
        node[names.get(kind, kind)] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return collections["params"], collections["batch_stats"]


def randomize(module):
    """Random values everywhere, so that no scale of one and no bias of zero hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            is_positive = tensor.ndim == 1 and not name.endswith(("bias", "mean"))
            tensor.copy_(noise.abs() + 0.5 if is_positive else noise * 0.3)


def batch_norm_counts(module, x):
    """Values that each BatchNorm averages over: PyTorch's running variance is n / (n - 1) of ours."""
    counts = {}
    hooks = [
        part.register_forward_hook(
            lambda _, inputs, __, name=name: counts.update({name.replace(".", "/"): inputs[0][:, 0].numel()})
        )
        for name, part in module.named_modules()
        if isinstance(part, nn.BatchNorm2d)
    ]
    module.eval()(x)
    for hook in hooks:
        hook.remove()
    return counts


def assert_same(ours, theirs, what):
    ours, theirs = flatten(ours), flatten(theirs)
    assert ours.keys() == theirs.keys(), what
    for path, value in theirs.items():
        np.testing.assert_allclose(ours[path], value, rtol=1e-7, atol=1e-10, err_msg=f"{what} {path}")


def assert_same_statistics(ours, theirs, before, counts):
    ours, theirs, before = flatten(ours), flatten(theirs), flatten(before)
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        layer, kind = path.rsplit("/", 1)
        factor = (counts[layer] - 1) / counts[layer] if kind == "var" else 1.0
        want = 0.9 * before[path] + factor * (value - 0.9 * before[path])
        np.testing.assert_allclose(ours[path], want, rtol=1e-9, err_msg=path)
        assert np.abs(want - before[path]).max() > 1e-3, path


def check_parity(model, module, size):
    """Evaluation and training logits, every gradient, running statistics, and the losses of plain descent."""
    x = np.random.default_rng(0).normal(size=(BATCH, *size, 3))
    x_torch, labels = torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(LABELS)
    with torch.no_grad():
        randomize(module)
        counts = batch_norm_counts(module, x_torch)
    params, stats = to_flax(module.state_dict())
    variables = {"params": params, **({"batch_stats": stats} if stats else {})}
    expected = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, dict(expected))
    evaluate = jax.jit(model.apply)
    assert_same(evaluate(variables, x), module.eval()(x_torch).detach().numpy(), "evaluation")

    @jax.jit
    def step(params, stats):
        def loss_fn(params):
            variables = {"params": params, **({"batch_stats": stats} if stats else {})}
            logits, changed = model.apply(variables, x, train=True, mutable=["batch_stats"])
            loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), LABELS[:, None], 1).mean()
            return loss, (logits, changed.get("batch_stats", {}))

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    module.train()
    losses = []
    for i in range(N_STEPS):
        (loss, (logits, new_stats)), gradients = step(params, stats)
        module.zero_grad()
        logits_torch = module(x_torch)
        loss_torch = F.cross_entropy(logits_torch, labels)
        loss_torch.backward()
        if i == 0:
            assert_same(logits, logits_torch.detach().numpy(), "training logits")
            assert_same_statistics(new_stats, to_flax(module.state_dict())[1], stats, counts)
        gradients_torch, _ = to_flax({name: p.grad for name, p in module.named_parameters()})
        assert_same(gradients, gradients_torch, f"gradient at step {i}")
        assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(gradients))
        np.testing.assert_allclose(loss, loss_torch.item(), rtol=1e-9)
        losses.append(float(loss))
        params, stats = jax.tree.map(lambda p, g: p - RATE * g, params, gradients), new_stats
        with torch.no_grad():
            for p in module.parameters():
                p -= RATE * p.grad
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


DOUBLE = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def norm_of(kind):
    return "batch" if kind == "batch" else make_norm("group", n_groups=2)


def test_mlp():
    model = MLP(widths=(8, 8), n_outputs=3, activation="gelu", residual=True, **DOUBLE)
    check_parity(model, TorchMLP(), (2, 2))


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("size", [(8, 8), (9, 11)])
def test_cnn(norm, size):
    model = CNN(n_outputs=3, features=(4, 6), norm=norm_of(norm), dense_width=5, **DOUBLE)
    check_parity(model, TorchCNN(norm), size)


@pytest.mark.parametrize(
    ("block", "norm", "stem", "size"),
    [
        (BasicBlock, "batch", "imagenet", (33, 30)),
        (BasicBlock, "group", "small", (9, 8)),
        (BottleneckBlock, "batch", "small", (9, 8)),
        (BottleneckBlock, "group", "imagenet", (32, 33)),
        (PreActBasicBlock, "batch", "small", (9, 8)),
        (PreActBottleneckBlock, "group", "imagenet", (33, 32)),
    ],
)
def test_resnet(block, norm, stem, size):
    model = ResNet(n_outputs=3, stage_sizes=(2, 1), block=block, width=4, stem=stem, norm=norm_of(norm), **DOUBLE)
    module = TorchResNet(norm, "Bottleneck" in block.__name__, "PreAct" in block.__name__, stem)
    check_parity(model, module, size)


@pytest.mark.parametrize("size", [(8, 8), (11, 9)])
def test_convnext(size):
    model = ConvNeXt(n_outputs=3, depths=(1, 1), widths=(4, 6), stem_size=2, **DOUBLE)
    check_parity(model, TorchConvNeXt(), size)
