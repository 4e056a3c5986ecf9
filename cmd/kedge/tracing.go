package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/stats"

	"kedge/cmd/kedge/config"
)

// tracing is where spans go. Without an endpoint they go nowhere and cost nothing.
type tracing struct {
	tracer trace.Tracer
	stats  stats.Handler // nil: none
	close  func() error
}

const traceFlushLimit = 3 * time.Second

// openTracing connects to the receiver in the background: one that is away keeps nobody waiting.
func openTracing(ctx context.Context, c config.Tracing, log *slog.Logger) (*tracing, error) {
	if c.Endpoint == "" {
		return &tracing{tracer: noop.NewTracerProvider().Tracer("kedge"), close: func() error { return nil }}, nil
	}
	options := []otlptracegrpc.Option{otlptracegrpc.WithEndpoint(c.Endpoint)}
	if c.Insecure {
		options = append(options, otlptracegrpc.WithInsecure())
	} else {
		secure := &tls.Config{MinVersion: tls.VersionTLS12}
		if c.CAFile != "" {
			roots, err := readRoots(c.CAFile)
			if err != nil {
				return nil, fmt.Errorf("tracing.caFile: %w", err)
			}
			secure.RootCAs = roots
		}
		options = append(options, otlptracegrpc.WithTLSCredentials(credentials.NewTLS(secure)))
	}
	exporter, err := otlptracegrpc.New(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("preparing to send traces to %s: %w", c.Endpoint, err)
	}
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("sending traces", "endpoint", c.Endpoint, "error", err) }))
	provider := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(c.SampleRatio))),
		sdktrace.WithResource(resource.NewSchemaless(attribute.String("service.name", "kedge"), attribute.String("service.version", version))),
	)
	return &tracing{
		tracer: provider.Tracer("kedge"),
		stats:  otelgrpc.NewServerHandler(otelgrpc.WithTracerProvider(provider), otelgrpc.WithPropagators(propagation.TraceContext{})),
		close: func() error {
			flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), traceFlushLimit)
			defer cancel()
			if err := provider.Shutdown(flush); err != nil {
				log.Warn("the last traces were not sent", "endpoint", c.Endpoint, "error", err)
			}
			return nil
		},
	}, nil
}
