"A tiny text encoder with random weights, for the tests that read texts."
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, MT5Config, MT5ForConditionalGeneration, PreTrainedTokenizerFast

WORDS = ["steel", "ruler", "graph", "paper", "pencil", "30", "cm", "box"]


def write_encoder(folder: Path, kind: str = "bert", seed: int = 0, words: list[str] = WORDS) -> Path:
    "A tiny encoder with random weights and a tokenizer of a few words."
    names = ["<pad>", "<unk>", "<s>", "</s>", *words, "<mask>"][: None if kind == "bert" else -1]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
                                   eos_token="</s>", mask_token="<mask>" if kind == "bert" else None, model_max_length=64)
    torch.manual_seed(seed)
    if kind == "bert":
        model = BertModel(BertConfig(vocab_size=len(names), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=32))
    else:
        model = MT5ForConditionalGeneration(MT5Config(vocab_size=len(names), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
