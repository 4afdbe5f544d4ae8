// SPDX-License-Identifier: Apache-2.0

package packaging

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestClusterFiles: shellcheck finds no fault with the scripts that a cluster runs, nor with those of the packages that
// keep to its idea of POSIX; the example's XML is well-formed.
func TestClusterFiles(t *testing.T) {
	need(t, "shellcheck", "xmllint")
	output(t, "shellcheck", "ocf/lockstep", "ocf/pacemaker-arbiter", "scripts/postinst", "scripts/postrm")
	output(t, "xmllint", "--noout", "examples/web1-pacemaker.xml") // Pacemaker itself is lenient
}

// played puts commands into a folder, which are scripts that note their command line in its file "calls".
func played(t *testing.T, dir string, scripts map[string]string) {
	t.Helper()
	for name, script := range scripts {
		text := fmt.Sprintf("#!/bin/sh\necho \"${0##*/} $*\" >>%s/calls\n%s\n", dir, script)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// TestPacemakerArbiter: what the arbiter asks of Pacemaker before it says yes. TestPacemaker of the soak has a real one.
func TestPacemakerArbiter(t *testing.T) {
	const fenced, changed = "stonith_admin --reboot beta\n", "cibadmin --modify --xpath //nvpair[@id='lockstep-web1-entry' and @value='3 beta'] --xml-text <nvpair id=\"lockstep-web1-entry\" value=\"4 alpha\"/>\n"
	const swap = "swap web1 4 beta alpha beta"
	for name, x := range map[string]struct {
		ask, quorum, entry, runs, fence, change string // "false": it fails
		score, members                          string // of beta, "none": there is none; the partition's, "": both
		answer                                  string // "": none, and the exit code is not 0
		does                                    string // of Pacemaker's state
	}{
		"read":                     {ask: "read web1", entry: "3 beta", answer: "3 beta"},
		"read, nothing there":      {ask: "read web1", entry: "0", answer: "0"},
		"read without quorum":      {ask: "read web1", quorum: "0", entry: "3 beta"},
		"swap":                     {ask: swap, entry: "3 beta", runs: "beta Promoted", answer: "4 alpha", does: fenced + changed},
		"unpromoted":               {ask: swap, entry: "3 beta", runs: "beta ", answer: "4 alpha", does: fenced + changed},
		"stopped there":            {ask: swap, entry: "3 beta", runs: "alpha", answer: "4 alpha", does: changed},
		"is being stopped":         {ask: swap, entry: "3 beta", runs: "stops", score: "none", answer: "4 alpha", does: changed},
		"is stopped too slowly":    {ask: swap, entry: "3 beta", runs: "beta", score: "none", answer: "4 alpha", does: fenced + changed},
		"lost, without a score":    {ask: swap, entry: "3 beta", runs: "stops", score: "none", members: "alpha", answer: "4 alpha", does: fenced + changed},
		"lives, with a score":      {ask: swap, entry: "3 beta", runs: "stops", answer: "4 alpha", does: fenced + changed},
		"a name that begins alike": {ask: swap, entry: "3 beta", runs: "beta2", answer: "4 alpha", does: changed},
		"not known where":          {ask: swap, entry: "3 beta", runs: "false"},
		"not fenced":               {ask: swap, entry: "3 beta", runs: "beta", fence: "false", does: fenced},
		"changed meanwhile":        {ask: swap, entry: "3 beta", runs: "alpha", change: "false", does: changed},
		"without quorum":           {ask: swap, quorum: "0", entry: "3 beta", runs: "beta"},
		"done before":              {ask: swap, entry: "4 alpha", runs: "beta", answer: "4 alpha"},
		"lost":                     {ask: swap, entry: "4 beta", runs: "beta", answer: "4 beta"},
		"goes on alone":            {ask: "swap web1 4 alpha alpha beta", entry: "3 alpha", runs: "beta", answer: "4 alpha", does: fenced + strings.Replace(changed, "3 beta", "3 alpha", 1)},
		"the first": {ask: "swap web1 1 - alpha beta", entry: "0", runs: "beta", answer: "1 alpha",
			does: "cibadmin --create --scope crm_config --xml-text <cluster_property_set id=\"lockstep-web1\"><nvpair id=\"lockstep-web1-entry\" name=\"lockstep-web1\" value=\"1 alpha\"/></cluster_property_set>\n"},
		"not the first": {ask: "swap web1 1 - alpha beta", entry: "3 beta", runs: "beta", answer: "3 beta"},
		"another word":  {ask: "write web1", entry: "3 beta"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			ends := func(how, prints string) string {
				if how == "false" {
					return "exit 1"
				}
				return prints
			}
			quorum := cmp.Or(x.quorum, "1")
			played(t, dir, map[string]string{
				"crm_node":      fmt.Sprintf(`case $1 in -q) echo %s ;; *) echo "%s" ;; esac`, quorum, cmp.Or(x.members, "alpha beta")),
				"crm_attribute": fmt.Sprintf(`case "$*" in *"--node beta --name master-web1 "*) [ "%s" != none ] && echo 100 ;; *) echo '%s' ;; esac`, x.score, x.entry),
				// stops: it has stopped after some time.
				"crm_resource": ends(x.runs, fmt.Sprintf(`runs="%s"
case $(grep -c "^sleep" "${0%%/*}/calls")$runs in [0-4]stops) runs="beta Promoted" ;; esac
echo "resource web1 is running on: $runs"`, x.runs)),
				"sleep":         "",
				"stonith_admin": ends(x.fence, ""),
				"cibadmin":      ends(x.change, `value=${0%/*}; words=${*##*value=\"}; echo "<nvpair id=\"lockstep-web1-entry\" name=\"lockstep-web1\" value=\"${words%%\"*}\"/>" >"$value/cib.xml"; echo it prints`),
			})
			// What was done before is on the disk, after a while; so is what another host did.
			if err := os.WriteFile(filepath.Join(dir, "cib.xml"), fmt.Appendf(nil, `<nvpair id="lockstep-web1-entry" name="lockstep-web1" value="%s"/>`, x.entry), 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("ocf/pacemaker-arbiter", append([]string{"web1"}, strings.Fields(x.ask)...)...)
			cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "LOCKSTEP_TEST_CIB="+filepath.Join(dir, "cib.xml"))
			var errs strings.Builder
			cmd.Stderr = &errs
			out, err := cmd.Output()
			if x.answer == "" && (err == nil || len(out) > 0 || errs.Len() == 0) || x.answer != "" && (err != nil || string(out) != x.answer+"\n") {
				t.Errorf("%q, %v, want %q\n%s", out, err, x.answer, errs.String())
			}
			var did strings.Builder
			for line := range strings.Lines(read(t, filepath.Join(dir, "calls"))) {
				if strings.HasPrefix(line, "stonith_admin") || strings.HasPrefix(line, "cibadmin") {
					did.WriteString(line)
				}
			}
			if did.String() != x.does {
				t.Errorf("it did\n%s\nwant\n%s", did.String(), x.does)
			}
		})
	}
}

// agentUnderSystemd is what a played systemd does, as process 1: the agent's actions, one after the other, and
// the exit code of each. Its arguments are a folder with the played commands and the agent.
const agentUnderSystemd = `#!/bin/sh
dir=$1 agent=$2
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$dir/upper,workdir=$dir/work" /etc
mkdir -p /etc/lockstep
touch /etc/lockstep/web1.yaml
echo 'NODE=alpha' >/etc/lockstep/web1.env
export PATH="$dir:$PATH" OCF_ROOT=/usr/lib/ocf HA_RSCTMP="$dir" OCF_RESOURCE_INSTANCE=web1:0 OCF_RESKEY_CRM_meta_on_node=alpha
for action in monitor start promote monitor demote monitor stop monitor; do
	"$agent" $action 2>>"$dir/errors"
	echo "$action $?" >>"$dir/calls"
done
echo 'NODE=beta' >/etc/lockstep/web1.env
"$agent" validate-all 2>>"$dir/errors"
echo "validate-all $?" >>"$dir/calls"
`

// TestAgentUsesUnit: where systemd runs, the agent starts and stops the unit of the config, and nothing else.
func TestAgentUsesUnit(t *testing.T) {
	lt.NeedRoot(t)
	if _, err := os.Stat("/usr/lib/ocf/lib/heartbeat/ocf-shellfuncs"); err != nil {
		lt.Missing(t, "no resource-agents: make deps installs them (%v)", err)
	}
	dir := t.TempDir()
	for _, name := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	played(t, dir, map[string]string{
		"systemctl": `up=${0%/*}/up
case $1 in
start) touch "$up" ;;
stop) rm -f "$up" ;;
is-active) if [ -e "$up" ]; then echo active; else echo inactive; exit 3; fi ;;
esac`,
		"journalctl": "echo the last line",
		"lockstep": `case $1 in
status) [ -e "${0%/*}/up" ] || exit 3; printf '{\n  "vm": "web1",\n  "role": "primary",\n  "state": "solo",\n  "detail": "an \"odd\", detail",\n  "covered": false\n}\n' ;;
esac`,
	})
	if err := os.WriteFile(filepath.Join(dir, "systemd"), []byte(agentUnderSystemd), 0o755); err != nil {
		t.Fatal(err)
	}
	agent, err := filepath.Abs("ocf/lockstep")
	if err != nil {
		t.Fatal(err)
	}
	output(t, "unshare", "--mount", "--pid", "--fork", "--mount-proc", filepath.Join(dir, "systemd"), dir, agent)
	var did strings.Builder
	for line := range strings.Lines(read(t, filepath.Join(dir, "calls"))) {
		if !strings.HasPrefix(line, "lockstep status") && !strings.HasPrefix(line, "systemctl is-active") && !strings.HasPrefix(line, "journalctl") {
			did.WriteString(line)
		}
	}
	const want = `monitor 7
systemctl start lockstep@web1
start 0
promote 0
monitor 8
demote 0
monitor 0
systemctl stop lockstep@web1
lockstep unload --end-guest -c /etc/lockstep/web1.yaml --node alpha
stop 0
monitor 7
validate-all 2
`
	errs := read(t, filepath.Join(dir, "errors"))
	if did.String() != want || !strings.Contains(errs, "/etc/lockstep/web1.env does not say NODE=alpha") {
		t.Errorf("it did\n%s\nand not\n%s\n%s", did.String(), want, errs)
	}
}
