"""An OTLP collector built on the official protos, which keeps all spans that it receives."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Received:
    """A span. attributes: as Python values."""

    def __init__(self, service, span):
        self.service = service
        self.name = span.name
        self.trace_id, self.span_id = span.trace_id.hex(), span.span_id.hex()
        self.parent_id = span.parent_span_id.hex()
        self.seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        self.started_s = span.start_time_unix_nano / 1e9
        self.attributes = {each.key: value_of(each.value) for each in span.attributes}

    def __repr__(self):
        return f"{self.service}: {self.name} {self.seconds * 1e3:.1f} ms {self.attributes}"


def value_of(value):
    return getattr(value, value.WhichOneof("value"))


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self):
        self.spans = []

    def Export(self, request, context):
        for resource in request.resource_spans:
            names = {each.key: value_of(each.value) for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [Received(names["service.name"], span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@contextlib.contextmanager
def receiving():
    """Run a receiver. Gives the receiver and its URL."""
    receiver, server = Receiver(), grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield receiver, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None)
