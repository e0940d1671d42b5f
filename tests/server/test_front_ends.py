"""Ways into a server beside SGLang's HTTP server: its gRPC port, its server in Rust, and SMG's gRPC server, which a
router gives token ids and pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.wrappers_pb2 import BytesValue
from PIL import Image
from smg_grpc_proto import sglang_scheduler_pb2 as proto
from smg_grpc_proto import sglang_scheduler_pb2_grpc as calls
from transformers import AutoProcessor

from plain_http import as_oracle_answer, fine, generate
from processing import runs_of
from serving import DENSE_BELOW, References, Served, ran_sparse, same, serve
from sglang_mminfer.serving.trace import PrefillRecord
from sglang_mminfer.testing.oracle import OracleAnswer
from sglang_mminfer.tools.media import make_image
from sglang_mminfer.tools.server import Server, free_port

pytestmark = [pytest.mark.server("one_shot"), pytest.mark.wide]

FLAGS = ("--attention-backend", "mminfer", "--sleep-on-idle", "--chunked-prefill-size", "96")

Turn = dict[str, Any]
"""The body of a turn for /generate."""

Answered = list[tuple[Turn, OracleAnswer]]
"""The turns of a conversation, and the answer to each."""


@pytest.fixture(scope="module")
def turns(servers: Callable[[str], Served], tmp_path_factory: pytest.TempPathFactory) -> Answered:
    """A conversation about three pictures, and the answers of SGLang's HTTP server."""
    folder, words, pictures, found = tmp_path_factory.mktemp("pictures"), "", [], []
    for i in range(3):
        words += "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
        words += "<|im_start|>assistant\n"
        pictures = [*pictures, str(make_image(folder / f"{i}.png", 280 + 28 * i, 336, seed=i))]
        turn = {"text": words, "image_data": pictures}
        found.append((turn, as_oracle_answer(fine(generate(servers("one_shot"), **turn)))))
        words += "A river and a stone.<|im_end|>\n"
    return found


def check_records(records: Sequence[PrefillRecord], turn: Turn, answer: OracleAnswer, cached: int) -> None:
    """Every token that was not cached once, sparse where the prompt is long enough, with the pictures' rasters."""
    assert sum(r.chunk_len for r in records) == len(answer.prompt_ids) - cached
    assert ran_sparse([r for r in records if r.seq_len > DENSE_BELOW]) or len(answer.prompt_ids) <= DENSE_BELOW
    media = [segment for segment in records[-1].map or [] if segment.modality != "text"]
    assert len(media) == len(turn["image_data"]) and all(segment.grid for segment in media)


def test_the_grpc_port(model: Path, sparse_config: Path, references: References, tmp_path: Path) -> None:
    """Chats with videos, as over HTTP."""
    port = free_port("127.0.0.1")
    served = serve(tmp_path, model, (*FLAGS, "--mminfer-config", str(sparse_config), "--grpc-port", str(port)), {})
    with served.server, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        # A message with one field of bytes, the JSON of an OpenAI request or answer.
        chat = channel.unary_unary(
            "/sglang.runtime.v1.SglangService/ChatComplete",
            request_serializer=BytesValue.SerializeToString,
            response_deserializer=BytesValue.FromString,
        )
        for i, (prompt, expected) in enumerate(references.turns):
            body = {"model": "default", "messages": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            body |= {"rid": f"turn-{i}", "return_token_ids": True}
            (answer,) = json.loads(chat(BytesValue(value=json.dumps(body).encode()), timeout=60).value)["choices"]
            # Its log-probabilities have tokens in place of their ids.
            ids = answer["prompt_token_ids"], answer["response_token_ids"]
            same(expected, OracleAnswer(*ids, expected.top_logprobs, answer["message"]["content"]))
            assert ran_sparse([r for r in served.records(f"turn-{i}") if r.seq_len > DENSE_BELOW])


def test_the_rust_server(model: Path, sparse_config: Path, turns: Answered, tmp_path: Path) -> None:
    """Pictures over /generate; SGLang's Rust server takes no others."""
    flags = (*FLAGS, "--mminfer-config", str(sparse_config))
    served = serve(tmp_path, model, flags, {"SGLANG_RUST_SERVER": "1"})
    with served.server:
        before = 0
        for i, (turn, expected) in enumerate(turns):
            answer = fine(generate(served, rid=f"turn-{i}", **turn))
            assert answer["meta_info"]["prompt_tokens"] == len(expected.prompt_ids)
            same(expected, as_oracle_answer({**answer, "prompt_token_ids": expected.prompt_ids}))
            check_records([r for r in served.records() if r.rid.startswith(f"turn-{i}#")], turn, expected, before)
            before = len(expected.prompt_ids)


class SmgServer(Server):
    """SGLang under SMG's gRPC server."""

    @cached_property
    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(f"{self.host}:{self.port}")

    def healthy(self) -> bool:
        try:
            return calls.SglangSchedulerStub(self.channel).HealthCheck(proto.HealthCheckRequest(), timeout=5).healthy
        except grpc.RpcError:
            return False

    def generate(self, processor: Any, turn: Turn, rid: str, rasters: int | None = None) -> OracleAnswer:
        """Asks as a router does, which makes the ids and the pixels.

        Args:
            rasters: of how many pictures it tells the raster; of all, as a router must, if it is None.
        """
        pictures = [Image.open(path) for path in turn["image_data"]]
        made = processor(text=[turn["text"]], images=pictures, return_tensors="pt")
        ids, token = made["input_ids"][0].tolist(), processor.image_token_id
        places = [(start, stop - start) for one, start, stop in runs_of(ids) if one == token]
        request = proto.GenerateRequest(
            request_id=rid,
            tokenized=proto.TokenizedInput(original_text=turn["text"], input_ids=ids),
            mm_inputs=proto.MultimodalInputs(
                pixel_values=tensor(made["pixel_values"]),
                model_specific_tensors={"image_grid_thw": tensor(made["image_grid_thw"][:rasters])},
                modalities=["image"],
                im_token_id=token,
                mm_placeholders=[proto.PlaceholderRange(offset=a, length=n) for a, n in places],
            ),
            sampling_params=proto.SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True),
            return_logprob=True,
            top_logprobs_num=20,
            logprob_start_len=-1,
        )
        *_, last = calls.SglangSchedulerStub(self.channel).Generate(request, timeout=60)
        answer = last.complete
        tops = [dict(zip(row.token_ids, row.values)) for row in answer.output_logprobs.top_logprobs]
        return OracleAnswer(ids, list(answer.output_ids), tops, "", cached_tokens=answer.cached_tokens)


def tensor(values: torch.Tensor) -> Any:
    dtype = str(values.dtype).removeprefix("torch.")
    return proto.TensorData(data=values.numpy().tobytes(), shape=values.shape, dtype=dtype)


def test_smg(model: Path, sparse_config: Path, turns: Answered, tmp_path: Path) -> None:
    flags = (*FLAGS, "--mminfer-config", str(sparse_config), "--grpc-mode", "--skip-server-warmup")
    served = serve(tmp_path, model, flags, {}, SmgServer)
    processor = AutoProcessor.from_pretrained(model)
    with served.server as server:
        assert isinstance(server, SmgServer)
        before = 0
        for i, (turn, expected) in enumerate(turns):
            answer = server.generate(processor, turn, f"turn-{i}")
            same(expected, answer)
            assert answer.cached_tokens == before
            check_records(served.records(f"turn-{i}"), turn, answer, before)
            before = len(expected.prompt_ids)
        with pytest.raises(grpc.RpcError, match="media: cannot be placed in the prompt"):
            server.generate(processor, turns[1][0], "one-raster", rasters=1)
        same(turns[0][1], server.generate(processor, turns[0][0], "after"))
