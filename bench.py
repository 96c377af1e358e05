"""
Every figure of the README, measured against the peer on the same machine in the same run.

    python bench.py train config/stdlib.py        # step time, tokens/s, MFU: modern and classic, compile, our attention and SDPA
    python bench.py size config/gpt2_124m.py      # parameters, FLOPs, memory, time and compute-optimal tokens before spending any
    python bench.py plot out/a out/b              # loss of several runs against steps, tokens and seconds (needs matplotlib)
    python bench.py scaling out/a out/b out/c     # a loss law fitted to finished runs, and what it says of larger ones

Speed is a ratio: contestants take turns within one run and the median counts, so a machine that slows down slows all of them.
"""
import dataclasses, json, math, os, statistics, sys, time

import numpy as np
import torch

import config, train as trainer
from model import GPT

# ---------------------------------------------------------------------------- tools

def table(header, rows):
    """Print rows of strings and numbers in columns wide enough for all of them."""
    text = [header] + [[c if isinstance(c, str) else f"{c:,.2f}" if isinstance(c, float) else f"{c:,}" for c in row] for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    for row in text: print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))))


def take_turns(contestants, rounds):
    """{name: function} -> {name: median seconds}, each called once to warm up and then in turn, GPU work included."""
    times = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            if torch.cuda.is_available(): torch.cuda.synchronize()
            if i: times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def read_log(folder):
    """The records of a run's log.jsonl, as {"loss": [...], "val_bpb": [...]} and so on, only lines that have the key."""
    path = os.path.join(folder, "log.jsonl")
    if not os.path.exists(path): raise ValueError(f"no {path}: give the out_dir of a run, e.g. out/stdlib")
    with open(path, encoding="utf-8") as f: return [json.loads(line) for line in f]

# ---------------------------------------------------------------------------- training

CLASSIC = dict(pos="learned", norm="layernorm", mlp="gelu", bias=True, qk_norm=False, tie_weights=True, zero_init=False, logit_softcap=0.0,
               optimizer="adamw", n_kv_head=0, n_inner=0)


def bench_train(argv):
    """One optimizer step of the config's size, modern and classic, compile on and off, our attention and SDPA."""
    cfg = config.load(argv)
    machine = trainer.Machine(cfg)
    variants = {"modern": cfg, "classic (GPT-2, AdamW)": dataclasses.replace(cfg, **CLASSIC)}
    contestants, flops, peaks = {}, {}, {}
    x = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size), device=machine.device)
    for name, c in variants.items():
        for compiled in (False, True):
            for backend in ("flash_attn", "sdpa") if machine.device.type == "cuda" else ("sdpa",):
                raw = GPT(c.model()).to(machine.device)
                raw.set_backend()
                if raw.backend != backend:
                    raw.backend = backend
                    for block in raw.transformer.h: block.attn.backend = backend
                optimizers, model = raw.configure_optimizers(c), torch.compile(raw) if compiled else raw
                label = f"{name}, {backend}" + (", compiled" if compiled else "")
                def step(label=label, model=model, optimizers=optimizers):
                    if machine.device.type == "cuda": torch.cuda.reset_peak_memory_stats()
                    with machine.autocast: loss = model(x, x)[1]
                    loss.backward()
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                    if machine.device.type == "cuda": peaks[label] = torch.cuda.max_memory_allocated() / 2 ** 20
                contestants[label], flops[label] = step, raw.estimate_flops() * x.numel()
    times = take_turns(contestants, rounds=10)
    print(f"{machine.name}, torch {torch.__version__}, {str(machine.dtype).removeprefix('torch.')}, {x.numel():,} tokens a step")
    slowest = times["classic (GPT-2, AdamW), sdpa"]
    table(["step", "ms", "tokens/s", "TFLOP/s", "MFU", "speed", "peak MiB"],
          [[n, t * 1e3, f"{x.numel() / t:,.0f}", flops[n] / t / 1e12, f"{flops[n] / t / machine.peak:.1%}" if machine.peak else "unknown peak",
            f"{slowest / t:.2f} x", f"{peaks[n]:,.0f}" if n in peaks else "-"] for n, t in times.items()])

# ---------------------------------------------------------------------------- sizing

def parts(model):
    """Parameters by part: {"embedding": n, "attention": n, ...}."""
    groups = {"wte": "embedding", "wpe": "positions", "attn": "attention", "mlp": "MLP", "lm_head": "head"}
    count = {}
    for name, p in model.named_parameters():
        part = next((label for key, label in groups.items() if f".{key}." in f".{name}"), "norms")
        count[part] = count.get(part, 0) + p.numel()
    return count


def memory(cfg, n, muon):
    """
    Bytes by part for one training process. Weights and gradients are float32; AdamW keeps two more numbers a weight, Muon one.
    Activations kept for the backward pass, in bfloat16: per layer and token 34*C bytes without an attention matrix
    (Korthikanti et al. 2022, arXiv:2205.05198, equation 1), scaled to this MLP's width; the logits exist 2048 rows at a time.
    """
    per_token = cfg.n_layer * (18 * cfg.n_embd + 4 * cfg.inner * (2 if cfg.mlp == "swiglu" else 1)) * (2 if cfg.dtype == "float32" else 1)
    return {"weights": 4 * n, "gradients": 4 * n, "optimizer": 8 * n - 4 * muon, "activations": per_token * cfg.batch_size * cfg.block_size,
            "logits": 12 * min(2048, cfg.batch_size * cfg.block_size) * cfg.vocab_size}


def bench_size(argv):
    cfg = config.load(argv)
    with torch.device("meta"): model = GPT(cfg.model())
    n, flops, count = model.num_params(), model.estimate_flops(), parts(model)
    tokens = cfg.max_iters * (cfg.tokens_per_step or cfg.batch_size * cfg.block_size)
    table(["parameters", "count", "share"], [[k, v, f"{v / n:.1%}"] for k, v in count.items()] + [["all", n, "100.0%"]])
    muon = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2) if cfg.optimizer == "muon" else 0
    print()
    parts_of = memory(cfg, n, muon)
    table(["memory a device", "MiB"], [[k, v / 2 ** 20] for k, v in parts_of.items()] + [["all", sum(parts_of.values()) / 2 ** 20]])
    optimal = 20 * n
    print(f"\n{flops / 1e6:,.1f} MFLOP a token; {tokens:,} tokens in {cfg.max_iters:,} steps: {flops * tokens:.3g} FLOP, {tokens / n:.1f} tokens a parameter\n"
          f"Chinchilla's 20 tokens a parameter (arXiv:2203.15556) would be {optimal:,} tokens, {flops * optimal:.3g} FLOP\n")
    table(["one GPU at 40% of its dense bf16 peak", "this run, hours", "20 tokens a parameter, hours"],
          [[name, flops * tokens / (0.4 * peak) / 3600, flops * optimal / (0.4 * peak) / 3600] for name, peak in trainer.PEAK_FLOPS.items()])

# ---------------------------------------------------------------------------- seeing runs

def bench_plot(argv):
    if not argv: raise ValueError("name the runs to draw: python bench.py plot out/a out/b")
    runs = {folder: read_log(folder) for folder in argv}
    try: import matplotlib
    except ImportError: raise ValueError("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), sharey=True)
    for axis, key in zip(axes, ("step", "tokens", "seconds")):
        for folder, log in runs.items():
            line, = axis.plot(*zip(*[(r[key], r["loss"]) for r in log if "loss" in r]), alpha=0.4)
            points = [(r[key], r["val_loss"]) for r in log if "val_loss" in r]
            if points: axis.plot(*zip(*points), "o-", color=line.get_color(), label=f"{folder}, best {min(p[1] for p in points):.4f}")
        axis.set_xlabel(key)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats per token: thin = training, dots = validation")
    axes[0].legend()
    path = os.path.join(argv[0], "loss.png")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def fit_law(compute, loss):
    """
    (E, A, a) of loss = E + A * compute^-a (Kaplan et al. 2020, arXiv:2001.08361; Hoffmann et al. 2022): for every E on a grid below the lowest
    loss a straight line in logarithms, the E with the least squared error in the loss wins. Needs three runs; more are better.
    """
    best = None
    for E in np.linspace(0, min(loss) * 0.999, 2000):
        slope, intercept = np.polyfit(np.log(compute), np.log(np.array(loss) - E), 1)
        error = np.square(E + np.exp(intercept) * np.array(compute) ** slope - loss).sum()
        if best is None or error < best[0]: best = error, E, math.exp(intercept), -slope
    return best[1:]


def bench_scaling(argv):
    if len(argv) < 3: raise ValueError("a law of three unknowns needs at least three runs: python bench.py scaling out/a out/b out/c")
    points = []
    for folder in argv:
        with open(os.path.join(folder, "config.json")) as f: saved = json.load(f)
        with torch.device("meta"): model = GPT(config.GPTConfig(**{f.name: saved[f.name] for f in dataclasses.fields(config.GPTConfig)}))
        log = [r for r in read_log(folder) if "val_bpb" in r]
        if not log: raise ValueError(f"{folder} has no validation loss yet")
        points.append((model.estimate_flops() * log[-1]["tokens"], log[-1]["val_bpb"], model.num_params(), folder))
    points.sort()
    E, A, a = fit_law([p[0] for p in points], [p[1] for p in points])
    table(["run", "parameters", "FLOP", "bits/byte", "law"], [[f, n, f"{c:.3g}", f"{l:.4f}", f"{E + A * c ** -a:.4f}"] for c, l, n, f in points])
    print(f"\nbits per byte = {E:.4f} + {A:.4g} * FLOP^-{a:.4f}")
    table(["compute of the largest run", "predicted bits/byte"], [[f"{k} x", f"{E + A * (k * points[-1][0]) ** -a:.4f}"] for k in (2, 4, 10, 100)])

# ---------------------------------------------------------------------------- the command line

COMMANDS = {"train": bench_train, "size": bench_size, "plot": bench_plot, "scaling": bench_scaling}


def main(argv):
    if not argv or argv[0] not in COMMANDS:
        print(__doc__.strip())
        if argv and argv[0] not in ("-h", "--help"): raise ValueError(f"unknown benchmark {argv[0]!r}: choose {', '.join(COMMANDS)}")
        return
    COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    config.run(main, parse=list)
