"""
Train a GPT: one process or many, from a config to a checkpoint and a first sample.

    python train.py config/stdlib.py                                     # any machine; prepares the data if it is missing
    python train.py config/shakespeare.py --max_iters=2000 --seed=2      # every knob can be set (--help lists them)
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py             # DDP: NCCL on GPUs, gloo on CPUs
    python train.py config/stdlib.py --init_from=resume                  # go on from out_dir/ckpt.pt, exactly
    python train.py config/finetune_shakespeare.py --lora_rank=8         # go on from GPT-2, learning 0.5% of its size
    python train.py --dataset=prefs --objective=dpo ...                  # answers that people preferred, see prepare.py
    python train.py --dataset=notes --input=notes/ --init_from=gpt2      # go on from others' weights: GPT-2, or a Hugging Face folder

A step always means tokens_per_step tokens, however many devices share them: batches are a pure function of (seed, step, position),
so one process and eight see the same data and a resumed run goes on as if it had never stopped.
Writes out_dir/: ckpt.pt (last), best.pt (lowest validation loss), log.jsonl (a line per logged step), config.json.
"""
import contextlib, copy, dataclasses, datetime, functools, glob, itertools, json, math, os, shlex, signal, subprocess, sys, time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import config, prepare
from model import GPT, hf_config, load_checkpoint, load_hf, pick_device, save_checkpoint

# dense bf16 peak in FLOP/s, from the makers' data sheets; the first name found in the device's name counts. Unknown: no MFU.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "A10G": 70e12,
              "L40S": 362e12, "L4": 121e12, "4090": 165e12, "3090": 71e12, "V100": 125e12}

# ---------------------------------------------------------------------------- data

class Batches:
    """
    Blocks of T tokens and the T that follow each, shuffled anew every epoch. An epoch starts at a random offset (the text taken as a
    ring), cuts the text into len // T blocks and visits each once. Everything is a function of (seed, step, position): nothing to save.
    Where prepare.py has put a mask beside the bin, targets that do not count are -1.
    """
    def __init__(self, path, block_size, seed):
        self.data, self.T, self.seed = np.memmap(path, dtype="<u2", mode="r"), block_size, seed
        mask = os.path.splitext(path)[0] + ".mask"
        self.mask = np.memmap(mask, dtype=np.uint8, mode="r") if os.path.exists(mask) else None
        self.n, self.epoch = len(self.data) // block_size, None

    def span(self, number):
        """Where the number-th block of the run, counted over all epochs, starts and stops: T + 1 tokens, perhaps around the end."""
        epoch, i = divmod(number, self.n)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.offset, self.order = epoch, rng.integers(len(self.data)), rng.permutation(self.n)
        start = (self.offset + int(self.order[i]) * self.T) % len(self.data)
        return start, start + self.T + 1

    def windows(self, tokens):
        """Consecutive spans over the first `tokens` targets (0 = all of them), to evaluate on."""
        end = min(len(self.data) - 1, tokens or len(self.data))
        return [(start, min(start + self.T, end) + 1) for start in range(0, end, self.T)]

    def rows(self, spans):
        """Spans of at most T + 1 tokens -> inputs and targets as one array (2, B, T); targets past the end of a span are -1."""
        start, stop = np.array(spans).T[:, :, None]                                             # (B, 1) each
        at = start + np.arange(self.T + 1)
        ring = at % len(self.data)
        tokens, counts = self.data[ring].astype(np.int64), at[:, 1:] < stop
        if self.mask is not None: counts &= self.mask[ring[:, 1:]] > 0
        return np.stack((tokens[:, :-1], np.where(counts, tokens[:, 1:], -1)))

    def weigh(self, first, count):
        """How much blocks first .. first + count - 1 weigh in a step's mean: as their targets that count, or all the same."""
        return count if self.mask is None else int((self.rows([self.span(i) for i in range(first, first + count)])[1] >= 0).sum())

    def get(self, first, count, device):
        """Blocks first .. first + count - 1 as inputs and targets, both (count, T), copied to the device without waiting for it."""
        return to_device(self.rows([self.span(i) for i in range(first, first + count)]), device)

    def stream(self, step, accumulate, batch_size, run):
        """
        This rank's micro-batches from `step` on, and the share of the step that each is; rank r of W takes batches r, W + r, 2W + r, ..
        of those that make up a step. Shares add up to W, over which DDP takes the mean.
        """
        for n in itertools.count(step * accumulate):
            first, step_size = (n * run.world + run.rank) * batch_size, accumulate * run.world * batch_size
            if n % accumulate == 0: whole = max(self.weigh(n // accumulate * step_size, step_size), 1)
            yield *self.get(first, batch_size, run.device), self.weigh(first, batch_size) * run.world / whole


class Pairs(Batches):
    """Preference pairs, as prepare.py writes them: documents 2i (chosen) and 2i + 1 (rejected), each a row of its own, padded."""
    def __init__(self, path, block_size, seed, eot):
        super().__init__(path, block_size, seed)
        self.stop = np.flatnonzero(self.data == eot) + 1
        self.start, self.n = np.maximum(np.append(0, self.stop[:-1]), self.stop - block_size - 1), len(self.stop)   # a prompt too long loses its beginning

    def span(self, number):
        epoch, i = divmod(number, self.n)
        if epoch != self.epoch: self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n // 2)
        i = 2 * self.order[i // 2] + i % 2
        return self.start[i], self.stop[i]

    def windows(self, tokens):
        return list(zip(self.start, self.stop))[:max(tokens // self.T // 2 * 2, 2) if tokens else None]

    def weigh(self, first, count): return count


def to_device(rows, device):
    """(2, B, T) -> inputs and targets, both (B, T) on the device."""
    rows = torch.from_numpy(rows)
    return (rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)).unbind()

# ---------------------------------------------------------------------------- the objective

@torch.no_grad()
def reference_log_probs(model, frozen, x, y):
    """(B,) under the model that training started from: a frozen copy, or where there is none the same weights with LoRA off."""
    if frozen is not None: return frozen(x, y, by_row=True)[1]
    training = model.training
    model.eval().use_lora(False)
    result = model(x, y, by_row=True)[1]
    model.train(training).use_lora(True)
    return result


def measure(model, x, y, cfg, reference=None):
    """
    The loss, which training makes smaller, and what else to log: (loss,), or with preference pairs (loss, accuracy, margin), where the
    margin says how many nats times beta more than the reference prefers the chosen answer: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
    """
    if cfg.objective == "tokens": return model(x, y)[1][None]
    chosen, rejected = (model(x, y, by_row=True)[1] - reference(x, y)).view(-1, 2).T             # (B/2,) each
    margin = cfg.dpo_beta * (chosen - rejected)
    return torch.stack((-F.logsigmoid(margin).mean(), (margin > 0).float().mean(), margin.mean()))


@torch.no_grad()
def evaluate(model, batches, cfg, run, reference=None):
    """The means of `measure` over the batches' windows (the first eval_tokens), shared by the ranks; a list."""
    spans, total = batches.windows(cfg.eval_tokens), 0
    model.eval()
    for b in range(run.rank * cfg.batch_size, len(spans), run.world * cfg.batch_size):
        x, y = to_device(batches.rows(spans[b:b + cfg.batch_size]), run.device)
        with run.autocast: means = measure(model, x, y, cfg, reference)
        n = (y >= 0).sum() if cfg.objective == "tokens" else len(y) // 2
        total += torch.cat((means.double() * n, means.new_tensor([n], dtype=torch.float64))).cpu()
    model.train()
    if run.world > 1: dist.all_reduce(total, group=run.cpu_group)
    return (total[:-1] / total[-1]).tolist()

# ---------------------------------------------------------------------------- schedule and machine

def lr_factor(step, cfg):
    """Learning rate of a step as a part of its peak: linear warm-up, constant, then decay to min_lr_frac over the last decay_frac."""
    if step < cfg.warmup_iters: return (step + 1) / (cfg.warmup_iters + 1)
    begin = max(cfg.warmup_iters, round(cfg.max_iters * (1 - cfg.decay_frac)))
    if step < begin: return 1.0
    done = min((step - begin) / max(cfg.max_iters - begin, 1), 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if cfg.lr_schedule == "cosine" else 1 - done
    return cfg.min_lr_frac + (1 - cfg.min_lr_frac) * shape


def rendezvous():
    """
    Arguments for init_process_group. subtle: torchrun's store outlives a restart and still holds the addresses of the dead processes
    (pytorch/pytorch#135712), so a restarted run on one machine keeps its keys apart; on several, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env["WORLD_SIZE"] != env["LOCAL_WORLD_SIZE"]: return {}
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    return dict(store=dist.PrefixStore(f"restart {env['TORCHELASTIC_RESTART_COUNT']}", store), rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"]))


class Machine:
    """Where this process runs: rank and world size, device, dtype, compile; chosen from the config, sensibly where it says auto."""
    def __init__(self, cfg):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.distributed = "RANK" in os.environ
        self.device = pick_device(cfg.device, self.local_rank)
        if self.distributed:
            if self.device.type == "cuda": torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", **rendezvous())
            # a second group on the CPU: what waits for minutes (preparing data) or must not stall the GPU (flags) goes through it
            self.cpu_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
        self.dtype = pick_dtype(cfg.dtype, self.device)
        self.autocast = contextlib.nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, dtype=self.dtype)
        self.compile = self.device.type == "cuda" if cfg.compile is None else cfg.compile
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        self.peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
        self.name = name if self.device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"

    def any(self, flag):
        """True on every rank if `flag` is true on one: ranks must stop together."""
        if self.world == 1: return flag
        flag = torch.tensor(int(flag))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(flag)

    def wait(self):
        if self.world > 1: dist.barrier(group=self.cpu_group)


def pick_dtype(name, device):
    if name != "auto": return getattr(torch, name)
    if device.type == "cuda": return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    instructions = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}       # absent before torch 2.12
    return torch.bfloat16 if instructions.get("avx512_bf16") or instructions.get("amx_bf16") else torch.float32

# ---------------------------------------------------------------------------- the run

def gradient_accumulation(cfg, world):
    """Micro-batches per step and device: tokens_per_step = result * world * batch_size * block_size."""
    tokens, per_pass = cfg.tokens_per_step or cfg.batch_size * cfg.block_size, cfg.batch_size * cfg.block_size * world
    if tokens % per_pass:
        raise ValueError(f"tokens_per_step={tokens} is not a multiple of batch_size * block_size * {world} device(s) = {per_pass}: "
                         f"set --tokens_per_step={-(-tokens // per_pass) * per_pass} or change batch_size")
    return tokens // per_pass


def prepare_data(cfg, run):
    """meta.json's contents, after making the dataset where it is missing: rank 0 first, then one process on each machine without it."""
    for turn in (run.rank == 0, run.local_rank == 0):
        if turn and not prepare.prepared(cfg):
            print(f"data/{cfg.dataset} is not there yet: preparing it first", flush=True)
            prepare.main(cfg)
        run.wait()
    meta = prepare.verify(cfg)
    pairs = meta.get("form") == "pairs"
    if (cfg.objective == "dpo") != pairs:
        raise ValueError(f"objective={cfg.objective!r}, but {cfg.dataset} has {'' if pairs else 'no '}preference pairs: " +
                         ("set --objective=dpo" if pairs else 'prepare {"prompt", "chosen", "rejected"} lines, or leave objective out'))
    if cfg.doc_mask and (meta["eot"] is None or meta["documents"]["train"] < 2):
        raise ValueError(f"doc_mask keeps documents apart, and {cfg.dataset} is one text without end-of-text tokens: leave it out")
    for split in () if pairs else ("train", "val"):
        if meta["tokens"][split] <= cfg.block_size:
            raise ValueError(f"the {split} split of {cfg.dataset} has {meta['tokens'][split]} tokens, block_size is {cfg.block_size}: "
                             "give more text or set a smaller --block_size" + (" or a larger --val_fraction" if split == "val" else ""))
    path = os.path.join("data", cfg.dataset, "tokenizer.json")
    if not os.path.exists(path): return meta, meta["tokenizer"]
    with open(path, encoding="utf-8") as f: return meta, json.load(f)


def estimate_memory(cfg, model, world=1):
    """
    Bytes by part for one training process. Weights and gradients are float32; AdamW keeps two more numbers a weight, Muon one.
    Activations kept for the backward pass: per layer and token 18*C elements outside the MLP and 4 times its width within, a little under
    the 34*C bytes of Korthikanti et al. 2022, arXiv:2205.05198, without its attention matrix; the logits exist 2048 rows at a time.
    """
    n, rows = model.num_params(), cfg.batch_size * cfg.block_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    muon = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2) if cfg.optimizer == "muon" and trained == n else 0
    copies = 2 if cfg.objective == "dpo" and trained == n else 1    # dpo's reference
    per_layer = 2 * cfg.n_embd if cfg.grad_checkpoint else 18 * cfg.n_embd + 4 * cfg.inner * (2 if cfg.mlp == "swiglu" else 1)
    return {"weights": 4 * n * copies, "gradients": 4 * trained, "optimizer": (8 * trained - 4 * muon) // (world if cfg.shard_optimizer else 1),
            "activations": cfg.n_layer * per_layer * rows * (2 if cfg.dtype == "float32" else 1), "logits": 12 * min(2048, rows) * cfg.vocab_size}


def plan(cfg, model, run, accumulate, epoch):
    """What the run is going to be, on a few lines, and a warning if it will not fit the GPU."""
    flops, n, tokens = model.estimate_flops(), model.num_params(), accumulate * run.world * cfg.batch_size * cfg.block_size
    memory, total = sum(estimate_memory(cfg, model, run.world).values()), cfg.max_iters * tokens
    lines = [f"\n{n:,} parameters, {flops / 1e6:,.1f} MFLOP a token; the whole run {flops * total:.3g} FLOP"
             + (f", {clock(flops * total / (0.4 * run.peak * run.world))} at 40% of peak" if run.peak else ""),
             f"{tokens:,} tokens a step = {accumulate} x {run.world} device(s) x {cfg.batch_size} x {cfg.block_size}; {cfg.max_iters:,} steps are "
             f"{total:,} tokens = {total / epoch:.2f} epochs of {epoch:,}",
             f"{total / n:.2f} tokens a parameter (Chinchilla's optimum is about 20); about {memory / 2 ** 20:,.0f} MiB a device",
             f"device {run.name}, {str(run.dtype).removeprefix('torch.')}, compile {'on' if run.compile else 'off'}, "]
    if run.device.type == "cuda" and memory > (free := torch.cuda.mem_get_info(run.device)[0]):
        lines.insert(3, f"WARNING: {free / 2 ** 20:,.0f} MiB are free: lower --batch_size, or set --grad_checkpoint")
    return "\n".join(lines)


def adopt(cfg, run, checkpoint, say):
    """
    (cfg, folder) where the weights begin as another model's, from its Hugging Face folder: cfg with its shape (a smaller block_size stays)
    and tokenizer. A run that began so and is resumed has both in its checkpoint; folder is "" then, and where nothing is adopted.
    """
    fields, folder = [f.name for f in dataclasses.fields(config.GPTConfig)], ""
    if checkpoint:
        new = {k: v for k, v in checkpoint["config"].items() if k in (*fields, "tokenizer", "init_from")}
        if new["init_from"] in ("scratch", "resume"): return cfg, ""
    else:
        for turn in (run.rank == 0, run.local_rank == 0, True):     # the first to come downloads what is missing
            if turn: folder = prepare.pretrained(cfg.init_from)
            run.wait()
        if not folder: return cfg, ""
        new = dataclasses.asdict(hf_config(folder)[1]) | dict(tokenizer=prepare.own_tokenizer(cfg).tokenizer)
        new["block_size"] = min(new["block_size"], cfg.block_size)
    new["dropout"] = cfg.dropout
    changed = [f"{k} {getattr(cfg, k)!r} -> {v!r}" for k, v in new.items() if v != getattr(cfg, k) and k != "init_from"]
    say(f"the model of {folder or new['init_from']} sets: {', '.join(changed) or 'nothing else than this config'}\n")
    return dataclasses.replace(cfg, **new), folder


def check_resume(checkpoint, cfg, meta, say):
    """Say what differs from the run that wrote the checkpoint; another model shape or tokenizer is an error."""
    shape, new = {f.name for f in dataclasses.fields(config.GPTConfig)} - {"dropout"} | {"lora_rank", "objective"}, dataclasses.asdict(cfg)
    changed = {k: f"{k} {old!r} -> {new[k]!r}" for k, old in checkpoint["config"].items() if k in new and new[k] != old and k != "init_from"}
    if fatal := [text for k, text in changed.items() if k in shape]:
        raise ValueError(f"cannot resume, the checkpoint's model differs: {', '.join(fatal)}; use its values or another --out_dir")
    if checkpoint["meta"]["tokenizer_hash"] != meta["tokenizer_hash"]:
        raise ValueError(f"cannot resume: data/{cfg.dataset} was prepared with another tokenizer than the checkpoint's; prepare it again "
                         "with that one, or train into another --out_dir")
    if changed: say("resuming with a changed config: " + ", ".join(changed.values()))


def prefers(means):
    """[0.75, 1.2] -> ' | 75.0% preferred, margin 1.200'; nothing where there are no pairs."""
    return f" | {means[0]:.1%} preferred, margin {means[1]:.3f}" if means else ""


def clock(seconds):
    """12 -> '0:12', 3700 -> '1:01:40'"""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


class Log:
    """log.jsonl in out_dir, one JSON object a line, written by rank 0; a resumed run drops the lines past its checkpoint."""
    def __init__(self, out_dir, step, cfg):
        self.path, self.wandb = os.path.join(out_dir, "log.jsonl"), None
        if cfg.wandb_log:
            try: import wandb
            except ImportError: raise ValueError("wandb_log=True needs wandb: pip install wandb, or --no_wandb_log") from None
            self.wandb = wandb.init(project=cfg.wandb_project, name=os.path.basename(out_dir), config=dataclasses.asdict(cfg))
        if not os.path.exists(self.path): return
        with open(self.path, encoding="utf-8") as f: lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
        with open(self.path + ".tmp", "w", encoding="utf-8") as f: f.writelines(lines)
        os.replace(self.path + ".tmp", self.path)

    def __call__(self, **record):
        with open(self.path, "a", encoding="utf-8") as f: f.write(json.dumps(record) + "\n")
        if self.wandb: self.wandb.log(record, step=record["step"])


class Stop:
    """
    SIGINT and SIGTERM ask the loop to finish its step and save; another one later stops at once. `asked`: when, in seconds, or 0.
    subtle: on Ctrl-C torchrun signals its workers, which have had the terminal's signal already, so an echo within 3 seconds does not count.
    """
    def __init__(self, say):
        self.asked, self.say = 0.0, say
        for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.asked and time.time() - self.asked > 3: raise KeyboardInterrupt
        if self.asked: return
        self.asked = time.time()
        self.say(f"\n{signal.Signals(number).name}: finishing this step, then saving (once more: stop at once)", flush=True)


def show_sample(out_dir, device):
    """In a process of its own: what a reader would type, and proof that the checkpoint suffices."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sample.py")
    subprocess.run([sys.executable, script, f"--out_dir={out_dir}", "--max_new_tokens=200", f"--device={device.type}"], check=False)


def main(cfg):
    run = Machine(cfg)
    try:
        out_dir = train(cfg, run)
        if out_dir and run.rank == 0:
            show_sample(out_dir, run.device)
            print(f"\nmore: python sample.py --out_dir={out_dir} --start=\"...\"")
    except torch.OutOfMemoryError:
        raise ValueError(f"out of GPU memory: halve --batch_size ({cfg.batch_size}); tokens_per_step keeps the run the same") from None
    finally:
        if run.distributed: dist.destroy_process_group()


def train(cfg, run):
    """The whole run; returns out_dir, or None if it was stopped before its last step."""
    say = print if run.rank == 0 else lambda *args, **kw: None
    if cfg.shard_optimizer and run.world == 1: raise ValueError("shard_optimizer shares the state among ranks: start with torchrun, or leave it out")
    out_dir, data_dir = cfg.out_dir or os.path.join("out", cfg.dataset), os.path.join("data", cfg.dataset)
    last, best_path = os.path.join(out_dir, "ckpt.pt"), os.path.join(out_dir, "best.pt")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and os.path.exists(last)      # by torchrun --max-restarts
    resume = cfg.init_from == "resume" or restarted
    if os.path.exists(last) and not resume:
        raise ValueError(f"{last} exists: go on with --init_from=resume, choose another --out_dir, or delete {out_dir}")
    run.wait()      # nobody writes before everybody has looked
    checkpoint = load_checkpoint(last) if resume else None
    cfg, folder = adopt(cfg, run, checkpoint, say)
    say(config.show(cfg))
    accumulate = gradient_accumulation(cfg, run.world)
    meta, tokenizer = prepare_data(cfg, run)

    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")
    # raw_model is saved, evaluated and sampled, without compile's and DDP's wrappers
    raw_model = load_hf(folder, run.device, config=cfg.model()).train() if folder else GPT(cfg.model()).to(run.device)
    if cfg.lora_rank: raw_model.add_lora(cfg.lora_rank)
    frozen = copy.deepcopy(raw_model).requires_grad_(False).eval() if cfg.objective == "dpo" and not cfg.lora_rank else None
    optimizers = raw_model.configure_optimizers(cfg)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    step, best, seconds, bad = 0, math.inf, 0.0, 0
    if resume:
        check_resume(checkpoint, cfg, meta, say)
        raw_model.load_state_dict(checkpoint["model"])
        if frozen is not None: frozen.load_state_dict(checkpoint["reference"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True): optimizer.load_state_dict(state)
        scaler.load_state_dict(checkpoint["scaler"])
        step, best, seconds = checkpoint["step"], checkpoint["best"], checkpoint["seconds"]
        checkpoint = None
        say(f"resuming {last} at step {step}")
    backend, raw_model.grad_checkpoint, raw_model.doc_mask = raw_model.set_backend(), cfg.grad_checkpoint, meta["eot"] if cfg.doc_mask else None
    model = torch.compile(raw_model) if run.compile else raw_model
    if run.world > 1: model = DDP(model, device_ids=[run.device.index] if run.device.type == "cuda" else None)

    reference = functools.partial(reference_log_probs, raw_model, frozen)
    batches, val_batches = (Batches(path, cfg.block_size, cfg.seed) if cfg.objective == "tokens" else Pairs(path, cfg.block_size, cfg.seed, meta["eot"])
                            for path in (os.path.join(data_dir, "train.bin"), os.path.join(data_dir, "val.bin")))
    tokens_per_step, flops = accumulate * run.world * cfg.batch_size * cfg.block_size, raw_model.estimate_flops()
    say(plan(cfg, raw_model, run, accumulate, batches.n * cfg.block_size) + f"attention: {backend}\n")
    if run.rank == 0:
        os.makedirs(out_dir, exist_ok=True)
        with open(os.path.join(out_dir, "config.json"), "w") as f: json.dump(dataclasses.asdict(cfg), f, indent=1)
    log = Log(out_dir, step, cfg) if run.rank == 0 else lambda **record: None
    stop = Stop(say)

    def save(*paths):
        if cfg.shard_optimizer:
            for optimizer in optimizers: optimizer.consolidate_state_dict(to=0)
        for path in paths if run.rank == 0 else ():
            more = dict(reference=frozen.state_dict()) if frozen is not None else {}
            save_checkpoint(path, dict(more, model=raw_model.state_dict(), optimizers=[o.state_dict() for o in optimizers], scaler=scaler.state_dict(),
                                       step=step, best=best, seconds=seconds, config=dataclasses.asdict(cfg), meta=meta, tokenizer=tokenizer))

    def validate():
        nonlocal best
        val, *preferred = evaluate(raw_model, val_batches, cfg, run, reference)
        size = meta.get("answers", meta)
        bpb = val * size["tokens"]["val"] / size["bytes"]["val"] / math.log(2)      # nats per token that counts -> bits per byte
        more = dict(zip(("val_accuracy", "val_margin"), preferred)) or dict(val_bpb=bpb)
        log(step=step, tokens=step * tokens_per_step, seconds=seconds, val_loss=val, **more)
        say(f"step {step:>6}/{cfg.max_iters} | validation: " + (f"loss {val:.4f}" + prefers(preferred) if preferred else
            f"{val:.4f} nats per token, {bpb:.4f} bits per byte") + (" | best" if val < best else ""), flush=True)
        kept = [os.path.join(out_dir, f"ckpt_{step:06d}.pt")] if cfg.keep_checkpoints else []
        better, best = val < best, min(val, best)
        save(*([best_path] if better else []), last, *kept)
        if kept and run.rank == 0:
            for old in sorted(glob.glob(os.path.join(out_dir, "ckpt_*.pt")))[:-cfg.keep_checkpoints]: os.remove(old)

    profiler = torch.profiler.profile(schedule=torch.profiler.schedule(wait=0, warmup=3, active=cfg.profile, repeat=1), on_trace_ready=lambda p:
        p.export_chrome_trace(os.path.join(out_dir, "trace.json"))) if cfg.profile and run.rank == 0 else None
    if profiler: profiler.start()
    feed = batches.stream(step, accumulate, cfg.batch_size, run)
    x, y, share = next(feed)
    started, first_step, t = seconds, step, time.time()                     # seconds: spent in steps, over all resumes
    logged, mark, loss_sum = step, seconds, 0.0
    while step < cfg.max_iters:
        factor = lr_factor(step, cfg)
        for optimizer, lrs in zip(optimizers, peaks):
            for group, lr in zip(optimizer.param_groups, lrs): group["lr"] = lr * factor
        if cfg.dropout: torch.manual_seed((cfg.seed << 32) + step * run.world + run.rank)      # so a resumed run drops the same units
        for micro in range(accumulate):
            with contextlib.nullcontext() if run.world == 1 or micro == accumulate - 1 else model.no_sync():
                with run.autocast: means = measure(model, x, y, cfg, reference) * share
                x, y, share = next(feed)            # read and copied while the device is busy with this one
                scaler.scale(means[0]).backward()   # with DDP the last one averages the gradients over the ranks
            loss_sum += means.detach()
        for optimizer in optimizers: scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), cfg.grad_clip or math.inf).item()
        if math.isfinite(norm):
            for optimizer in optimizers: scaler.step(optimizer)
            bad = 0
        else:
            bad += 1
            say(f"step {step + 1:>6}/{cfg.max_iters} | gradient norm is {norm}: step skipped, {bad} in a row", flush=True)
        scaler.update()
        for optimizer in optimizers: optimizer.zero_grad(set_to_none=True)
        step += 1
        if profiler: profiler.step()
        if bad >= cfg.max_bad_steps:
            raise ValueError(f"{bad} steps in a row had a non-finite gradient: the last good checkpoint is {last}; go on from it with "
                             "a lower learning rate or --dtype=float32")

        if step % cfg.log_interval == 0 or step == first_step + 1 or step == cfg.max_iters:
            if run.world > 1: dist.all_reduce(loss_sum)
            loss_mean, *preferred = (loss_sum / run.world / (step - logged)).tolist()
            seconds, t = seconds + time.time() - t, time.time()
            rate = (step - logged) * tokens_per_step / (seconds - mark)
            mfu = flops * rate / run.world / run.peak if run.peak else None
            say(f"step {step:>6}/{cfg.max_iters} | loss {loss_mean:.4f}{prefers(preferred)} | lr {factor:.3f} of peak | norm {norm:.3f} | {rate:,.0f} tok/s"
                + (f" | mfu {mfu:.1%}" if mfu else "") + f" | {clock((cfg.max_iters - step) * (seconds - started) / (step - first_step))} left", flush=True)
            log(step=step, tokens=step * tokens_per_step, seconds=seconds, loss=loss_mean, lr=factor, norm=norm, tok_per_s=rate, mfu=mfu,
                **dict(zip(("accuracy", "margin"), preferred)))
            logged, mark, loss_sum = step, seconds, 0.0
        stopping = run.any(bool(stop.asked))
        sampling = cfg.sample_interval and step % cfg.sample_interval == 0
        if step % cfg.eval_interval == 0 or step == cfg.max_iters or stopping or sampling:
            seconds += time.time() - t
            validate() if not stopping or step == cfg.max_iters else save(last)
            if run.rank == 0 and sampling and step < cfg.max_iters: show_sample(out_dir, run.device)
            t = time.time()
        if stopping and step < cfg.max_iters:
            words = [word for word in sys.argv if word != "--init_from=resume"] + ["--init_from=resume"]
            say(f"saved {last} at step {step}; go on with: {'torchrun [its options]' if run.distributed else 'python'} {shlex.join(words)}")
            return None
    say(f"\n{step - first_step} steps in {clock(seconds - started)}, besides evaluation; best validation loss {best:.4f} nats per token: {best_path}\n", flush=True)
    return out_dir


if __name__ == "__main__":
    config.run(main)
