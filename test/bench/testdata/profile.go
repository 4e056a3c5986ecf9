package main

import (
	"log/slog"
	"os"
	"os/signal"
	"runtime/pprof"
	"syscall"
)

// The bench lays this file over cmd/kedge for a build of its own: SIGUSR1 begins a CPU profile, and the next one writes it.
func init() {
	path := os.Getenv("KEDGE_BENCH_PROFILE")
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGUSR1)
	go func() {
		for range signals {
			if err := profileUntil(signals, path); err != nil {
				slog.Error("profiling", "error", err)
			}
		}
	}()
}

func profileUntil(signals <-chan os.Signal, path string) error {
	file, err := os.Create(path + ".new")
	if err != nil {
		return err
	}
	defer file.Close()
	if err := pprof.StartCPUProfile(file); err != nil {
		return err
	}
	<-signals
	pprof.StopCPUProfile()
	return os.Rename(path+".new", path)
}
