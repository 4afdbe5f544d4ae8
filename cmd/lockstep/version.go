// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
)

// version is set by the Makefile.
var version string

func newVersion(e env) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintln(e.stdout, "lockstep", versionString())
			return err
		},
	}
}

// versionString falls back to what the Go tool recorded.
func versionString() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		if v := info.Main.Version; strings.HasPrefix(v, "v") { // `go install` of a tag
			return v
		}
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return strings.TrimSpace(s.Value)
			}
		}
	}
	return "devel"
}
