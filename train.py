"""
Train a GPT: one process or many, from a config to a checkpoint and a first sample.

    python train.py config/stdlib.py                                # any machine; prepares the data if it is missing
    python train.py config/shakespeare.py --max_iters=2000          # every knob can be set (--help lists them)
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py        # DDP: NCCL on GPUs, gloo on CPUs
    python train.py config/stdlib.py --init_from=resume             # continue from out_dir/ckpt.pt, exactly
    python train.py config/finetune_shakespeare.py --lora_rank=8 --learning_rate=1e-3   # GPT-2, training 0.5% as many weights
    python train.py --init_from=FOLDER --dataset=notes --input=FILES --optimizer=adamw --learning_rate=3e-5     # or other weights
    python train.py --dataset=prefs --input=prefs.jsonl --objective=dpo     # learn which answers people preferred, see prepare.py

A step is tokens_per_step tokens, however many devices share them. Batches are a pure function of (seed, step, position), so one
process and eight see the same data, and a resumed run continues as if it had never stopped.
Writes to out_dir: ckpt.pt (last), best.pt (lowest validation loss), log.jsonl (a line per report or evaluation), config.json.
"""
import contextlib, copy, dataclasses, datetime, errno, functools, json, math, os, platform, re, shlex, signal, subprocess
import sys, threading, time, warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import config, prepare
from config import require
from model import GPT, has_bfloat16, hf_config, load_checkpoint, load_hf, pick_device, save_checkpoint, stretched, why_not_compile

# dense bf16 peak in FLOP/s (V100, T4: fp16) by data sheet. Of the keys that the device's name holds as whole words, the first
# counts; without one there is no MFU, nor for laptops, whose "4090" is another chip
PEAK_FLOPS = {"Laptop": None, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
              "B200": 2250e12, "A100": 312e12, "A40": 150e12, "A10": 125e12, "A10G": 70e12, "A6000": 155e12, "L40S": 362e12,
              "L40": 181e12, "L4": 121e12, "5090": 210e12, "4090": 165e12, "3090": 71e12, "V100": 125e12, "T4": 65e12}

# ---------------------------------------------------------------------------- data

class Batches:
    """Rows of T tokens, and for each token the next one as its target. An epoch treats the text as a ring, starts anywhere, cuts
    it into len // T rows and visits these in random order, all as a function of (seed, step, position): there is no state to
    save. With `eot`, which ends every document, documents 2i and 2i + 1 are a preference pair, chosen and rejected, and get a
    row each, padded. If prepare.py has put a mask beside the bin, targets that do not count are -1."""
    def __init__(self, path, block_size, seed, eot=None):
        self.data, self.T, self.seed = np.memmap(path, dtype="<u2", mode="r"), block_size, seed
        mask = os.path.splitext(path)[0] + ".mask"
        self.masked = os.path.exists(mask)
        self.mask = np.memmap(mask, dtype=np.uint8, mode="r") if self.masked else np.broadcast_to(True, len(self.data))
        self.n, self.pairs = len(self.data) // block_size, None         # n: rows an epoch; pairs: n/2 times two (start, stop)
        if eot is not None:
            stop = np.flatnonzero(self.data == eot) + 1
            start = np.maximum(np.append(0, stop[:-1]), stop - block_size - 1)          # a prompt too long loses its beginning
            self.n, self.pairs = len(stop), np.stack((start, stop), axis=1).reshape(-1, 2, 2)

    @functools.lru_cache(1)
    def epoch(self, number):
        """(n, 2): where each row of an epoch starts and stops, T + 1 tokens; a row may wrap around the end."""
        rng = np.random.default_rng([self.seed, number])
        if self.pairs is not None: return rng.permutation(self.pairs).reshape(-1, 2)
        start = (rng.integers(len(self.data)) + self.T * rng.permutation(self.n)) % len(self.data)
        return np.stack((start, start + self.T + 1), axis=1)

    def spans(self, first, count):
        """(count, 2): start and stop of rows first .. first + count - 1, numbered through all epochs of the run."""
        return np.array([self.epoch(i // self.n)[i % self.n] for i in range(first, first + count)])

    def windows(self, tokens):
        """Spans for evaluation: all rows of the text if `tokens` is 0, else as many as hold that many, evenly spread over it."""
        start = np.arange(0, len(self.data) - 1, self.T)
        rows = np.stack((start, np.minimum(start + self.T + 1, len(self.data))), axis=1) if self.pairs is None else self.pairs
        count = min(max(tokens // (self.T if self.pairs is None else 2 * self.T), 1), len(rows)) if tokens else len(rows)
        return rows[np.arange(count) * len(rows) // count].reshape(-1, 2)

    def read(self, spans):
        """Spans of at most T + 1 tokens -> inputs and targets as one tensor (2, B, T); targets past the end of a span are -1."""
        start, stop = spans.T[:, :, None]                                               # (B, 1) each
        at = start + np.arange(self.T + 1)
        ring = at % len(self.data)
        tokens = self.data[ring].astype(np.int64)
        targets = np.where((at < stop) & (self.mask[ring] > 0), tokens, -1)
        return torch.from_numpy(np.stack((tokens[:, :-1], targets[:, 1:])))

    def weigh(self, rows):
        """A batch's weight in the mean over a step or an evaluation: how many of its targets count, or how many pairs it has."""
        return int((rows[1] >= 0).sum()) if self.pairs is None else rows.shape[1] // 2

    def share(self, spans, batch_size, run):
        """Yield this rank's batches of the spans: inputs and targets (B, T) on its device, and the weight. Rank r of W takes
        batches r, W + r, .. Copies to a GPU are asynchronous."""
        gpu = run.device.type == "cuda"
        for b in range(run.rank * batch_size, len(spans), run.world * batch_size):
            rows = self.read(spans[b:b + batch_size])
            x, y = (rows.pin_memory() if gpu else rows).to(run.device, non_blocking=gpu)
            yield x, y, self.weigh(rows)

# ---------------------------------------------------------------------------- the step

def objective(model, x, y, cfg, reference=None):
    """The loss of a batch: nats per token, or for each of its preference pairs, (B/2,), -log sigmoid(beta * margin). margin is
    by how many nats the model prefers the chosen answer to the rejected one, less the same of the reference: DPO, Rafailov et al.
    2023, arXiv:2305.18290, eq. 7."""
    if cfg.objective == "tokens": return model(x, y)[1]
    chosen, rejected = (model(x, y, by_row=True)[1] - reference(x, y, by_row=True)[1]).view(-1, 2).T    # (B/2,) each
    return -F.logsigmoid(cfg.dpo_beta * (chosen - rejected))

@torch.no_grad()
def evaluate(model, batches, cfg, run, reference=None):
    """[mean loss, share of the preference pairs that are right] over eval_tokens of the batches' windows, which the ranks share.
    A pair is right if its margin is positive, its loss below log 2."""
    total = torch.zeros(3, dtype=torch.float64)         # on the CPU: MPS has no float64
    model.eval()
    for x, y, weight in batches.share(batches.windows(cfg.eval_tokens), cfg.batch_size, run):
        with run.autocast: loss = objective(model, x, y, cfg, reference)
        total += weight * torch.stack((loss.mean(), (loss < math.log(2)).float().mean(), loss.new_ones(()))).cpu().double()
    model.train()
    if run.world > 1: dist.all_reduce(total, group=run.cpu_group)
    return (total[:2] / total[2]).tolist()

def lr_factor(step, cfg):
    """A step's learning rate as a fraction of the peak: warm-up, constant, then decay to min_lr_frac over the last decay_frac."""
    if step < cfg.warmup_iters: return (step + 1) / (cfg.warmup_iters + 1)
    begin = max(cfg.warmup_iters, round(cfg.max_iters * (1 - cfg.decay_frac)))
    done = min(max(step - begin, 0) / max(cfg.max_iters - begin, 1), 1)
    left = dict(linear=1 - done, cosine=0.5 * (1 + math.cos(math.pi * done)))[cfg.lr_schedule]
    return cfg.min_lr_frac + (1 - cfg.min_lr_frac) * left

@torch.no_grad()
def update(optimizers, bad):
    """Step every optimizer, or none if `bad` is set. The flag is on the device and, but for MPS, the host never waits for its
    value: AdamW's fused kernel takes it; Muon gets its momentum as gradient, so that it stays, and then its old weights back."""
    for optimizer in optimizers:
        inner, before = getattr(optimizer, "optim", optimizer), {}      # optim: this rank's part of a sharded optimizer
        if inner.defaults.get("fused"): inner.found_inf = bad.float()
        elif isinstance(inner, torch.optim.Muon):
            before = {p: p.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
            for p in before: p.grad = torch.where(bad, inner.state.get(p, {}).get("momentum_buffer", 0), p.grad)
        elif bad: continue                                      # MPS: no fused AdamW, so the host waits here
        optimizer.step()
        for p, old in before.items(): p.copy_(torch.where(bad, old, p))

# ---------------------------------------------------------------------------- the machine

class Machine:
    """Where this process runs: rank, launcher (see launched_by), device, dtype, ..: as in the config, with values for auto."""
    def __init__(self, cfg):
        env = os.environ
        self.rank, self.local_rank = int(env.get("RANK", 0)), int(env.get("LOCAL_RANK", 0))
        self.world, self.restarts = int(env.get("WORLD_SIZE", 1)), int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
        self.nodes, self.launcher = self.world // int(env.get("LOCAL_WORLD_SIZE", 1)), f"{platform.node()} {os.getppid()}"
        self.device = pick_device(cfg.device, self.local_rank)
        gpu, mps = self.device.type == "cuda", self.device.type == "mps"
        require(not mps or self.world == 1 and not (cfg.grad_checkpoint and cfg.dropout), "on MPS there is no torchrun, and "
                "grad_checkpoint would redraw dropout: add --device=cpu, or leave that out")
        if gpu: torch.cuda.set_device(self.device)
        if self.world > 1:
            # subtle: torchrun's store outlives a restart and still has the dead ranks' addresses (pytorch/pytorch#135712). On one
            # machine, a restarted run opens its own store on another port; on several, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
            if self.restarts and self.nodes == 1:
                env.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(int(env["MASTER_PORT"]) + self.restarts))
            dist.init_process_group("nccl" if gpu else "gloo")
            # a second group, on the CPU, for waits of many minutes (preparing data) and for flags, which must not stall the GPU
            self.cpu_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
        auto = torch.bfloat16 if has_bfloat16(self.device) else torch.float16 if gpu else torch.float32
        self.dtype = auto if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
        self.autocast = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
        cannot = why_not_compile(self.device)
        require(not (cfg.compile and cannot), f"--compile: {cannot}, or leave it out")
        self.compile = gpu and not cannot if cfg.compile is None else cfg.compile
        self.name = torch.cuda.get_device_name(self.device) if gpu else f"{self.device.type}, {torch.get_num_threads()} threads"
        self.peak = next((flops for key, flops in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", self.name)), None)

    def say(self, *words):
        with contextlib.suppress(OSError):      # the terminal, or the reader of a pipe, is gone: the run goes on
            if self.rank == 0: print(*words, flush=True)

    def any(self, flag):
        """True on every rank if `flag` is true on any: ranks must stop together. Waits until all ranks have called it."""
        flag = torch.tensor(int(bool(flag)))
        if self.world > 1: dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(flag)

    def in_turn(self, work):
        """Run work() on rank 0, then on one rank per machine, then on all, so that later ranks find the files written by earlier
        ones (and early ranks run it again). An error on one rank ends them all, and only that rank reports it."""
        for turn in (self.rank == 0, self.local_rank == 0, True):
            try: result, error = work() if turn else None, None
            except (ValueError, OSError) as e: error = e
            if self.any(error): raise error or SystemExit(1)
        return result

# ---------------------------------------------------------------------------- before the first step

def as_saved(cfg, run, old):
    """cfg with the model and tokenizer of the checkpoint `old`, to resume it. ValueError if cfg asks for another model now."""
    now, shape = dataclasses.asdict(cfg), [key for key in vars(cfg.model()) if key != "dropout"]
    lacks = [key for key in "asked config meta optimizers scaler reference step tokens best seconds".split() if key not in old]
    require(not lacks, f"the checkpoint is of another program or version, it lacks {', '.join(lacks)}: choose another --out_dir")
    asked = vars(config.Config()) | old["asked"]            # a knob newer than the checkpoint had its default value
    changed = {k: f"{k} {asked[k]!r} -> {v!r}" for k, v in now.items() if k != "init_from" and v != asked[k]}
    fatal = ", ".join(changed[k] for k in (*shape, "lora_rank", "objective", "optimizer") if k in changed)
    require(not fatal, f"cannot resume, the checkpoint differs: {fatal}; give the run's config files and knobs again, or "
            "choose another --out_dir")
    if old["step"] >= cfg.max_iters: run.say(f"the run has its {old['step']} steps already: to go on, raise --max_iters")
    run.say(f"resuming at step {old['step']} of {cfg.max_iters}, knobs changed: {', '.join(changed.values()) or 'none'}")
    keep = {*shape, "tokenizer", "init_from"} - changed.keys()      # not a tokenizer asked for: prepare_data tests its hash
    return dataclasses.replace(cfg, **{k: v for k, v in old["config"].items() if k in keep})

def as_pretrained(cfg, run, folder):
    """cfg with the shape and the tokenizer of the Hugging Face model in `folder`; dropout and a smaller block_size stay."""
    theirs, tokenizer = hf_config(folder)[1], prepare.own_tokenizer(cfg).tokenizer
    if cfg.rope_scaling != "none": theirs = stretched(theirs, cfg.rope_scaling, cfg.rope_factor)
    new = vars(theirs) | dict(block_size=min(theirs.block_size, cfg.block_size), dropout=cfg.dropout, tokenizer=tokenizer)
    changed = ", ".join(f"{k} {getattr(cfg, k)!r} -> {v!r}" for k, v in new.items() if v != getattr(cfg, k))
    run.say(f"the model in {folder} sets: {changed}\n")
    if cfg.optimizer == "muon" and not cfg.lora_rank:
        run.say("WARNING: Muon's rates are for new weights; for trained ones use --optimizer=adamw --learning_rate=3e-5\n")
    return dataclasses.replace(cfg, **new)

def prepare_data(cfg, run, old):
    """Training and validation batches, meta.json's contents, tokenizer; prepares a missing dataset. old: a checkpoint or {}."""
    if not prepare.prepared(cfg): run.say(f"data/{cfg.dataset} is not there yet: preparing it first")
    elif prepare.outdated(cfg) and old: run.say(f"{cfg.input} is newer than data/{cfg.dataset}: run prepare.py to use it")
    newer = lambda: not old and prepare.outdated(cfg) and prepare.verify(cfg)   # verify: true, or ValueError if knobs differ
    run.in_turn(lambda: (not prepare.prepared(cfg) or newer()) and prepare.main(cfg))
    meta, folder = prepare.verify(cfg), Path("data", cfg.dataset)
    pairs = meta.get("form") == "pairs"
    require(pairs == (cfg.objective == "dpo"), f"{cfg.dataset} has {'' if pairs else 'no '}preference pairs, see prepare.py: "
            f"set --objective={'dpo' if pairs else 'tokens'}")
    require(not cfg.doc_mask or meta["documents"]["train"] > 1, f"{cfg.dataset} is a single document: leave out --doc_mask")
    require(pairs or min(meta["tokens"].values()) > cfg.block_size, f"{cfg.dataset} has {meta['tokens']} tokens, "
            f"block_size is {cfg.block_size}: give more text or set a smaller --block_size (or for val a larger --val_fraction)")
    require(not old or old["meta"]["tokenizer_hash"] == meta["tokenizer_hash"],
            f"cannot resume: data/{cfg.dataset} has another tokenizer than the checkpoint: use the same, or another --out_dir")
    if old and old["meta"]["sha256"] != meta["sha256"]: run.say(f"resuming on other text: data/{cfg.dataset} has changed")
    batches, val_batches = (Batches(folder / f"{split}.bin", cfg.block_size, cfg.seed, meta["eot"] if pairs else None)
                            for split in ("train", "val"))
    counts = any(val_batches.mask[start + 1:stop].any() for start, stop in val_batches.windows(cfg.eval_tokens))
    require(counts, f"no target counts in eval_tokens={cfg.eval_tokens} of val.bin: raise it")
    own = folder / "tokenizer.json"
    return batches, val_batches, meta, json.loads(own.read_bytes()) if own.exists() else meta["tokenizer"]

def estimate_memory(cfg, model, world=1):
    """{part: bytes} of one training process. Weights and gradients are float32, plus 16-bit weights for autocast, a copy of the
    gradients in DDP's buckets; AdamW keeps two numbers per weight, Muon one. Activations per layer and token: 18*C bytes, and 4
    times the MLP's width, the 34*C of Korthikanti et al. 2022 (arXiv:2205.05198) without attention."""
    full, n, tokens = cfg.dtype == "float32", model.num_params(), cfg.batch_size * cfg.block_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    muon = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2) * (cfg.optimizer == "muon" and trained == n)
    copies = 2 if cfg.objective == "dpo" and trained == n else 1    # dpo's reference; with LoRA it shares the weights
    at_once = 512 if model.lm_head.weight.device.type == "cpu" else 4096        # see LinearCrossEntropy
    per_layer = 2 * cfg.n_embd if cfg.grad_checkpoint else 18 * cfg.n_embd + 4 * cfg.inner * (2 if cfg.mlp == "swiglu" else 1)
    return {"weights": (4 if full else 6) * n * copies, "gradients": 4 * trained * (2 if world > 1 else 1),
            "optimizer": (8 * trained - 4 * muon) // (world if cfg.shard_optimizer else 1),
            "activations": cfg.n_layer * per_layer * tokens * (2 if full else 1),
            "logits": (12 * min(at_once, tokens) + 4 * cfg.n_embd) * cfg.vocab_size}

def plan(cfg, model, run, tokens, epoch, val):
    """A few lines about the run ahead, with warnings. tokens: in a step; epoch: tokens in an epoch; val: in an evaluation."""
    flops, n, total = model.estimate_flops(), model.num_params(), cfg.max_iters * tokens
    cfg = dataclasses.replace(cfg, dtype=str(run.dtype).removeprefix("torch."))
    needed = sum(estimate_memory(cfg, model, run.world).values())
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf     # not on Windows
    if run.device.type == "cuda": room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated()   # plus our weights
    hours = f", {flops * total / (0.4 * run.peak * run.world) / 3600:,.2f} hours at 40% of peak" if run.peak else ""
    if run.device.type == "cuda" and not run.peak: hours = "; no mfu: PEAK_FLOPS does not have this device"
    note = f", but only {room / 2 ** 20:,.0f} fit: WARNING, lower --batch_size or use --grad_checkpoint" if needed > room else ""
    between = min(cfg.eval_interval, cfg.max_iters) * tokens
    slow = f": WARNING, --eval_tokens={between // 4} would be faster" if val > between else ""
    return (f"\n{n:,} parameters, {flops / 1e6:,.1f} MFLOP a token; the whole run {flops * total:.3g} FLOP{hours}\n"
            f"{tokens:,} tokens a step on {run.world} device(s), {epoch / tokens:,.1f} steps an epoch, {total:,} tokens in all\n"
            f"{val:,} validation tokens every {cfg.eval_interval} steps, for {between:,} of training{slow}\n"
            f"{total / n:.2f} tokens a parameter (Chinchilla's optimum is about 20); about {needed >> 20:,} MiB a device{note}\n"
            f"device {run.name}, {cfg.dtype}, compile {'on' if run.compile else 'off'}")

# ---------------------------------------------------------------------------- what a run leaves behind

def read_log(path):
    """The records of a log.jsonl, up to the first line that a crash has damaged: a resumed run drops what follows."""
    records = []        # subtle: extend keeps what it has read before the error
    with contextlib.suppress(ValueError): records.extend(map(json.loads, Path(path).read_bytes().splitlines()))
    return [r for r in records if isinstance(r, dict) and {"step", "tokens"} <= r.keys()]

def launched_by(out_dir):
    """The host and process id of the torchrun that began the run, or None."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return json.loads(Path(out_dir, "config.json").read_bytes())["launcher"]

class Log:
    """Reports a run's steps: a line on the terminal, a line in out_dir/log.jsonl, and wandb. Between two lines, losses are summed
    on the device, because reading a number from it waits for it. A resumed run drops the lines after its checkpoint."""
    def __init__(self, cfg, run, out_dir, tokens_per_step, flops, step, seconds, tokens):
        self.cfg, self.run, self.tokens_per_step, self.flops = cfg, run, tokens_per_step, flops     # flops: per token
        self.step, self.seconds, self.began = step, seconds, time.perf_counter() - seconds      # seconds without evaluation
        self.extra = tokens - step * tokens_per_step        # not 0 if earlier steps, before a resume, had another size
        self.sums = torch.zeros(2, device=run.device)       # since the last line: total loss and number of steps not skipped
        self.skipped_in_a_row = 0
        self.path, self.wandb, values = os.path.join(out_dir, "log.jsonl"), None, dataclasses.asdict(cfg)
        if run.rank > 0: return
        self.lock = prepare.lock(os.path.join(out_dir, ".lock"))        # held until the process ends
        require(self.lock, f"{out_dir} belongs to a run that has not ended: choose another --out_dir, or end that one first")
        if cfg.wandb_log:
            try: from wandb import init         # without wandb installed, a folder wandb/ that it left is an empty module
            except ImportError: raise ValueError("wandb_log=True needs wandb: pip install wandb, or --no_wandb_log") from None
            self.wandb = init(project=cfg.wandb_project, name=os.path.basename(os.path.normpath(out_dir)), config=values)
        prepare.write(os.path.join(out_dir, "config.json"), lambda f: f.write(json.dumps(
            values | dict(launcher=run.launcher), indent=1).encode()))
        kept = [r for r in read_log(self.path) if r["step"] <= step] if os.path.exists(self.path) else []
        prepare.write(self.path, lambda f: f.writelines(json.dumps(r).encode() + b"\n" for r in kept))

    def tokens(self, step): return self.extra + step * self.tokens_per_step     # read until then

    def write(self, step, text, **record):
        """Write a line for people (text) and the same for programs (record), on rank 0."""
        if self.run.rank > 0: return
        self.run.say(f"step {step:>6}/{self.cfg.max_iters} | {text}")
        record = dict(step=step, tokens=self.tokens(step), seconds=self.seconds, **record)
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}  # JSON has no NaN
        with open(self.path, "a", encoding="utf-8") as f: f.write(json.dumps(record) + "\n")
        if self.wandb: self.wandb.log(record, step=step)

    def add(self, loss, bad):
        """Add a step: its loss and whether it was skipped (bad), both on the device."""
        self.sums += torch.where(bad, 0, torch.stack((loss, torch.ones_like(loss))))
        self.skipped_in_a_row = torch.where(bad, self.skipped_in_a_row + 1, 0)

    def line(self, step, factor, norm):
        """Wait for the device and report the steps since the last line. factor, norm: of the last step."""
        if self.run.world > 1: dist.all_reduce(self.sums)
        total, good = (self.sums / self.run.world).tolist()
        loss, skipped, norm = total / good if good else math.nan, step - self.step - round(good), norm.item()
        seconds = time.perf_counter() - self.began
        rate = (step - self.step) * self.tokens_per_step / (seconds - self.seconds)
        mfu = self.flops * rate / self.run.world / self.run.peak if self.run.peak else None
        left = datetime.timedelta(seconds=round((self.cfg.max_iters - step) * seconds / step))      # at the average speed so far
        more = (f" | mfu {mfu:.1%}" if mfu else "") + (f" | {skipped} skipped, not finite" if skipped else "")
        self.step, self.seconds = step, seconds
        text = f"loss {loss:.4f} | lr {factor:.3f} of peak | norm {norm:.3f} | {rate:,.0f} tok/s{more} | {left} left"
        self.write(step, text, loss=loss, lr_factor=factor, norm=norm, skipped=skipped, tok_per_s=rate, mfu=mfu)
        self.sums.zero_()

def show_sample(out_dir, run, start):
    """Run sample.py with this prompt in a separate process, as a reader would: it shows that the checkpoint suffices."""
    words = [f"--out_dir={out_dir}", f"--device={run.device}", f"--start={start}"]
    subprocess.run([sys.executable, Path(__file__).resolve().with_name("sample.py"), *words])
    run.say(f'\nmore: python sample.py --out_dir={shlex.quote(str(out_dir))} --start="..."')

# ---------------------------------------------------------------------------- the run

def build(cfg, run, folder, old, eot):
    """The model, bare and wrapped by compile and DDP; dpo's reference; optimizers; loss scaler. State as in `old`, if any."""
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")
    model = load_hf(folder, run.device, config=cfg.model()).train() if folder else GPT(cfg.model()).to(run.device)
    shared = {id(p): p for p in model.parameters() if cfg.lora_rank}    # deepcopy's memo: LoRA changes none, so share them
    reference = copy.deepcopy(model, shared).requires_grad_(False).eval() if cfg.objective == "dpo" else None
    if cfg.lora_rank: model.add_lora(cfg.lora_rank)
    optimizers = model.configure_optimizers(cfg)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    if old:
        model.load_state_dict(old["model"])
        if reference: reference.load_state_dict(old["reference"])
        for optimizer, saved in zip(optimizers, old["optimizers"], strict=True):        # saved moments, but this run's knobs
            for new, was in zip(optimizer.param_groups, saved["param_groups"]):
                was.update((key, new[key]) for key in ("lr", "betas", "weight_decay", "fused") if key in new)
            optimizer.load_state_dict(saved)
        if old["scaler"]: scaler.load_state_dict(old["scaler"])         # empty if that run had none
    model.grad_checkpoint, model.eot = cfg.grad_checkpoint, eot if cfg.doc_mask else None
    wrapped = torch.compile(model) if run.compile else model
    warnings.filterwarnings("ignore", "`broadcast_buffers`")        # torch 2.13 has a new name for it, which 2.11 does not know
    if run.world > 1: wrapped = DDP(wrapped, [run.device] if run.device.type == "cuda" else None, broadcast_buffers=False)
    return model, wrapped, reference, optimizers, scaler

def train(cfg, run):
    """The whole run, from its first line to the final sample."""
    out_dir, asked = cfg.out_dir or f"out/{cfg.dataset}", dataclasses.asdict(cfg)    # asked: before as_saved or as_pretrained
    last = os.path.join(out_dir, "ckpt.pt")
    require(not cfg.shard_optimizer or run.world > 1, "shard_optimizer needs several ranks: start with torchrun, or leave it out")
    again = run.restarts and os.path.exists(last) and (run.nodes > 1 or launched_by(out_dir) == run.launcher)
    resume = run.any(cfg.init_from == "resume" or again)    # torchrun --max-restarts resumes only what it has begun itself
    require(resume or not os.path.exists(last), f"{last} exists: go on with --init_from=resume, or choose another --out_dir")
    folder, old = "", load_checkpoint(last) if resume else {}
    if old: cfg = as_saved(cfg, run, old)
    elif folder := run.in_turn(lambda: prepare.pretrained(cfg.init_from)): cfg = as_pretrained(cfg, run, folder)
    run.say(config.show(cfg))
    batch_tokens = cfg.batch_size * cfg.block_size
    tokens_per_step, unit = cfg.tokens_per_step or batch_tokens, batch_tokens * run.world
    require(tokens_per_step % unit == 0, f"tokens_per_step={tokens_per_step} is not a multiple of batch_size * block_size * "
            f"{run.world} device(s) = {unit}: set --tokens_per_step={-(-tokens_per_step // unit) * unit} or change batch_size")
    accumulate, rows = tokens_per_step // unit, tokens_per_step // cfg.block_size   # per step: batches per rank, rows over all
    batches, val_batches, meta, tokenizer = prepare_data(cfg, run, old)
    raw_model, model, reference, optimizers, scaler = build(cfg, run, folder, old, meta["eot"])
    step, best, seconds, tokens = [old[key] for key in ("step", "best", "seconds", "tokens")] if old else (0, math.inf, 0.0, 0)
    if old and (old["meta"]["sha256"]["val.bin"], old["config"]["eval_tokens"]) != (meta["sha256"]["val.bin"], cfg.eval_tokens):
        best = math.inf         # that was on other text, or other parts of it
    del old
    peaks = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    unused = len(optimizers) > 1 and all(p.dim() > 1 for p in raw_model.parameters())       # no gains, no biases
    if unused and cfg.learning_rate != config.Config.learning_rate:
        run.say("WARNING: learning_rate is not used: Muon's rates are matrix_lr, embedding_lr and unembedding_lr\n")
    val_tokens = int((np.diff(val_batches.windows(cfg.eval_tokens)) - 1).sum())
    about = plan(cfg, raw_model, run, tokens_per_step, batches.n * cfg.block_size, val_tokens)
    run.say(f"{about}, attention: {raw_model.set_backend()}\n")
    log = Log(cfg, run, out_dir, tokens_per_step, raw_model.estimate_flops(), step, seconds, tokens)
    signals, greeting = [], prepare.prompt_of("Hello!") if "form" in meta else cfg.start        # form: of chats
    def on_signal(number, frame):       # finish the step, save, end. A second one does nothing: torchrun repeats Ctrl-C
        with contextlib.suppress(OSError):      # the same Ctrl-C may have ended `| tee`. Not print: that may be busy
            if not signals and run.rank == 0: os.write(2, b"\nstopping after this step or evaluation\n")
        signals.append(number)
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:       # no SIGHUP on Windows
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) != signal.SIG_IGN:     # nohup
            run.at_end.callback(signal.signal, number, signal.signal(number, on_signal))    # a notebook goes on afterwards

    def save(*names):
        for optimizer in optimizers if cfg.shard_optimizer else (): optimizer.consolidate_state_dict(to=0)
        if run.rank > 0: return
        state = dict(model=raw_model.state_dict(), optimizers=[o.state_dict() for o in optimizers], scaler=scaler.state_dict(),
                     reference=reference and reference.state_dict(), step=step, tokens=log.tokens(step), best=best,
                     seconds=log.seconds, asked=asked, config=dataclasses.asdict(cfg), meta=meta, tokenizer=tokenizer)
        for name in names: save_checkpoint(os.path.join(out_dir, f"{name}.pt"), state)
        kept = [path for path in Path(out_dir).iterdir() if re.fullmatch(r"ckpt_\d+\.pt", path.name)]
        for path in sorted(kept, key=os.path.getmtime)[:-cfg.keep_checkpoints]: path.unlink()      # 0: [:0] deletes none

    def validate(sample=False):
        nonlocal best
        val, right = evaluate(raw_model, val_batches, cfg, run, reference)
        size = meta.get("answers", meta)
        bpb = val * size["tokens"]["val"] / size["bytes"]["val"] / math.log(2)      # by the whole split's tokens per byte
        better, best = val < best, min(best, val)           # subtle: min(val, best) would let a NaN in
        if reference: record, more = dict(val_right=right), f", {right:.1%} of pairs right"
        else: record, more = dict(val_bpb=bpb), f" nats per token, {bpb:.4f} bits per byte"
        log.write(step, f"validation: {val:.4f}{more}{' | best' if better else ''}", val_loss=val, **record)
        save(*["best"] * better, *["ckpt"] * (step > 0), *[f"ckpt_{step:06d}"] * (step > 0 and cfg.keep_checkpoints > 0))
        if sample and run.rank == 0: show_sample(out_dir, run, greeting)
        log.began = time.perf_counter() - log.seconds       # leave out evaluation

    if folder and not reference: validate()         # the loss to beat
    profiler = cfg.profile and run.rank == 0 and run.at_end.enter_context(torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=0, warmup=3, active=cfg.profile, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(os.path.join(out_dir, "trace.json"))))
    while step < cfg.max_iters:
        factor = lr_factor(step, cfg)
        for group, peak in peaks: group["lr"] = peak * factor
        if cfg.dropout: torch.manual_seed((cfg.seed << 32) + step * run.world + run.rank)  # the same after a resume
        spans, total = batches.spans(log.tokens(step) // cfg.block_size, rows), 0
        whole = max(batches.weigh(batches.read(spans)), 1) if batches.masked else tokens_per_step   # plain text: all count
        for micro, (x, y, weight) in enumerate(batches.share(spans, cfg.batch_size, run), 1):
            if run.world > 1: model.require_backward_grad_sync = micro == accumulate        # one all-reduce per step
            with run.autocast: loss = objective(model, x, y, cfg, reference).mean() * (weight * run.world / whole)  # DDP averages
            loss = loss * (1 + 0 * loss.detach())       # a loss that is not finite makes the gradients so, on all ranks
            scaler.scale(loss).backward()
            total += loss.detach()
        for optimizer in optimizers: scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), cfg.grad_clip or math.inf)
        bad = ~norm.isfinite()
        update(optimizers, bad)
        scaler.update()
        for optimizer in optimizers: optimizer.zero_grad(set_to_none=True)
        log.add(total, bad)
        step += 1
        if profiler: profiler.step()
        # on a GPU, all of the above is only queued (except with dpo); what follows waits for it, but only if a report is due
        stopping = run.any(signals) and step < cfg.max_iters
        sampling = cfg.sample_interval and step % cfg.sample_interval == 0 and step < cfg.max_iters
        evaluating = step % cfg.eval_interval == 0 or step == cfg.max_iters or sampling         # a sample needs a checkpoint
        if step % cfg.log_interval == 0 or step == 1 or evaluating or stopping:
            log.line(step, factor, norm)
            advice = f"resume from {last}" if os.path.exists(last) else "no checkpoint is saved yet, start again"
            require(log.skipped_in_a_row < cfg.max_bad_steps, f"{log.skipped_in_a_row} steps in a row had a non-finite gradient: "
                    f"{advice} with a lower learning rate or --dtype=float32")
        if stopping: save("ckpt")               # before any evaluation: the process may be killed soon after the signal
        if evaluating: validate(sampling and not stopping)
        if stopping: return run.say(f"stopped by a signal, saved {last}: give the same command with --init_from=resume to go on")
    spent = datetime.timedelta(seconds=round(log.seconds))
    found = f"best validation loss {best:.4f}: {out_dir}/best.pt" if best < math.inf else f"no validation loss: {last}"
    run.say(f"\n{step} steps in {spent}, without evaluation; {found}\n")
    if run.rank == 0: show_sample(out_dir, run, greeting)

def main(cfg):
    run = Machine(cfg)
    try:
        with contextlib.ExitStack() as run.at_end: train(cfg, run)      # a profiler still running would crash Python at exit
    except RuntimeError as e:       # on a GPU torch.OutOfMemoryError, elsewhere a plain one
        if not re.search("out of memory|t allocate memory|not enough memory", str(e)): raise
        tokens = cfg.tokens_per_step or cfg.batch_size * cfg.block_size
        raise ValueError(f"out of memory: halve --batch_size={cfg.batch_size} and set --tokens_per_step={tokens} to train "
                         "the same way in less memory, or use --grad_checkpoint") from None
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENOTDIR): raise
        raise OSError(f"{e}: free space or fix that path (--out_dir sets another); any earlier checkpoint is intact") from None
    if run.world > 1: dist.destroy_process_group()      # not after an error, when others may wait for this rank

if __name__ == "__main__":
    config.run(main)
